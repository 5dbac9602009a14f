// Netlify's own local server, on loopback only, and one request at a time: like the real service,
// and unlike this server by itself, which checks a condition, waits, and only then writes.
// Arguments: the folder of npm packages, the data folder, the token.
import { createRequire } from 'node:module'
import { Server } from 'node:net'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'

const [packages, directory, token] = process.argv.slice(2)
const { BlobsServer } = createRequire(join(packages, 'index.js'))('@netlify/blobs/server')

const listen = Server.prototype.listen
Server.prototype.listen = function (port, listening) {
  return listen.call(this, port, '127.0.0.1', listening)
}

class OneAtATime extends BlobsServer {
  turn = Promise.resolve()

  handleRequest(request) {
    const response = this.turn.then(() => super.handleRequest(request))
    // Its etag is the file's time in milliseconds: let each version have one of its own, also when timers are early.
    this.turn = response.then(() => request.method === 'PUT' && setTimeout(5))
    return response
  }
}

const { address } = await new OneAtATime({ directory, token }).start()
console.log(address)
process.stdin.on('end', () => process.exit()).resume() // the test that started it has ended
