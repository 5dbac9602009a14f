// dynalite, which speaks DynamoDB's protocol, on loopback only. Argument: the folder of npm packages.
import { createRequire } from 'node:module'
import { join } from 'node:path'

const [packages] = process.argv.slice(2)
const dynalite = createRequire(join(packages, 'index.js'))('dynalite')
const server = dynalite({ createTableMs: 0, deleteTableMs: 0 })
server.listen(0, '127.0.0.1', () => console.log(`http://127.0.0.1:${server.address().port}`))
process.stdin.on('end', () => process.exit()).resume() // the test that started it has ended
