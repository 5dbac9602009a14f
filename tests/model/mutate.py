"""A mutation check of the files that decide: `python -m tests.model.mutate [FILE ...]`.

Each mutant is one small change to one of `FILES`, in a copy of the project; it is
killed when a test fails. Survivors are printed: each is a missing test, or a change without effect.
"""

from __future__ import annotations

import ast
import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[2]
FILES = ("_protocol.py", "_record.py", "_ids.py")
TESTS = [
    "tests/unit",
    "tests/integration/test_node.py",
    "tests/model/test_exhaustive.py",
    "tests/model/test_life.py",
]
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult,
}  # fmt: skip


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """The small changes of one node."""
    if isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            if type(operator) in COMPARISONS:
                changed = copy.deepcopy(node)
                changed.ops[number] = COMPARISONS[type(operator)]()
                yield changed
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        yield from node.values
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif isinstance(node.value, int | float):
            yield ast.Constant(node.value + 1)
        elif isinstance(node.value, str):
            yield ast.Constant(node.value + "x")
        elif node.value is None:
            yield ast.Constant("")
    elif isinstance(node, ast.If | ast.While):
        yield type(node)(ast.Constant(False), node.body, node.orelse)
        yield type(node)(ast.Constant(True), node.body, node.orelse)
    elif isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Raise | ast.AugAssign | ast.Expr | ast.Continue | ast.Break):
        yield ast.Pass()
    elif isinstance(node, ast.Assign):
        yield ast.Assign(node.targets, ast.Constant(None))


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Each mutant's text, and a line that says what it changes."""
    tree = ast.parse(source)
    unchanged = ast.unparse(tree)
    skipped = set(_without_effect(tree))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        for changed in variants(node):
            ast.copy_location(changed, node)
            mutated = _Replace(node, changed).visit(copy.deepcopy(tree, {id(node): node}))
            line = getattr(node, "lineno", 0)
            before, after = ast.unparse(node), ast.unparse(changed)
            text = ast.unparse(ast.fix_missing_locations(mutated))
            if text != unchanged:
                what = f"line {line}: {before.splitlines()[0]!r} -> {after.splitlines()[0]!r}"
                yield text, what


def _without_effect(tree: ast.AST) -> Iterator[ast.AST]:
    """Docstrings, annotations and the texts of messages: no behaviour that a test should pin."""
    for node in ast.walk(tree):
        hidden: list[ast.AST | None] = []
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            hidden = [node]
        elif isinstance(node, ast.arg):
            hidden = [node.annotation]
        elif isinstance(node, ast.AnnAssign):
            alias = isinstance(node.annotation, ast.Name) and node.annotation.id == "TypeAlias"
            hidden = [node.annotation, node.value if alias else None]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            hidden = [node.returns]
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            hidden = list(node.exc.args)
        for part in hidden:
            if part is not None:
                yield from ast.walk(part)


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        if node is self.old:
            return self.new
        return self.generic_visit(node)


def survives(project: Path, name: str, text: str) -> bool:
    """Whether the tests pass with this text in the file's place."""
    target = project / "src" / "joblock" / name
    original = target.read_text(encoding="utf-8")
    target.write_text(text, encoding="utf-8")
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS]
    try:
        ran = subprocess.run(
            command,
            cwd=project,
            env=os.environ | {"PYTHONPATH": str(project / "src")},
            capture_output=True,
            check=False,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        return False
    finally:
        target.write_text(original, encoding="utf-8")
    return ran.returncode == 0


def main() -> int:
    todo = [
        (name, text, what)
        for name in sys.argv[1:] or FILES
        for text, what in mutants((ROOT / "src" / "joblock" / name).read_text(encoding="utf-8"))
    ]
    copies: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        workers = os.cpu_count() or 1
        for number in range(workers):
            project = Path(folder, str(number))
            shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".git", ".*cache"))
            copies.put(project)
        project, name = copies.get(), FILES[0]
        if not survives(project, name, (project / "src/joblock" / name).read_text("utf-8")):
            print("the tests fail without a mutant: nothing would be shown")
            return 1
        copies.put(project)

        def survivor(mutant: tuple[str, str, str]) -> str | None:
            name, text, what = mutant
            project = copies.get()
            try:
                return f"{name} {what}" if survives(project, name, text) else None
            finally:
                copies.put(project)

        with ThreadPoolExecutor(workers) as threads:
            survivors = 0
            for what in threads.map(survivor, todo):
                if what is not None:
                    survivors += 1
                    print(f"survived: {what}", flush=True)
    print(f"{len(todo)} mutants, {len(todo) - survivors} killed, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
