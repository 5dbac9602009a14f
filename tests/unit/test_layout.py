"""The house: which doors are open, and that its floors bear on each other in one direction."""

from __future__ import annotations

import ast
import inspect
import pickle
import pkgutil
import subprocess
import sys
import typing
from importlib import import_module
from pathlib import Path

import pytest

import joblock
from joblock import aio

PACKAGE = Path(joblock.__file__).parent

# From the ground up: a module imports only from those before it.
FLOORS = [
    "_value",
    "_record",
    "_errors",
    "_log",
    "_given",
    "_ids",
    "_results",
    "_store",
    "_protocol",
    "_waiting",
    "_lease",
    "_locks",
    "_hold",
    "stores._etag",
    "stores._http",
    "stores._remote",
    "stores._aws",
    "stores.memory",
    "stores.sqlite",
    "stores.s3",
    "stores.azure",
    "stores.gcs",
    "stores.netlify",
    "stores.redis",
    "stores.sql",
    "stores.dynamodb",
    "stores.object_store",
    "stores",
    "conformance",
    "aio",
    "testing",
    "",
    "_processes",
    "_output",
    "_child",
    "_cli",
    "__main__",
]
# A store's module knows what a store is, and what it shares with its neighbours; no other store.
FOR_STORES = {"_value", "_store", "stores._etag", "stores._http", "stores._remote", "stores._aws"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}
PUBLIC = [name for name in MODULES if not any(part.startswith("_") for part in name.split("."))]


def imports(name: str) -> set[str]:
    """The modules of the package that this one imports, anywhere in it, also only for types."""
    path = MODULES[name]
    package = name.split(".")[: None if path.stem == "__init__" else -1] if name else []
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".strip(".")
                found.add(inner if inner in MODULES else module)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    """No module imports one that stands above it, so there is no circle, not even for types."""
    below = FLOORS[: FLOORS.index(name)]
    if name.startswith("stores."):
        below = [floor for floor in below if floor in FOR_STORES]
    assert imports(name) <= set(below)


def test_the_imports_are_seen() -> None:
    """The test above must not pass because it finds none."""
    assert imports("_ids") == {"_errors", "_record"}
    assert imports("stores.netlify") == {"_store", "stores._http", "stores._remote"}
    assert {"_child", "_output", "conformance", "stores", ""} <= imports("_cli")


def defined(path: Path) -> set[str]:
    """The names that a module's own lines define at its top level; imports are not among them."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name):
                found.add(name)
            case ast.Assign(targets=targets):
                found |= {
                    it.id
                    for target in targets
                    for it in ast.walk(target)
                    if isinstance(it, ast.Name)
                }
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
            case _:
                pass
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_that_looks_public_is_meant_to_be(name: str) -> None:
    """What a public module defines without an underscore is in its `__all__`, and the reverse."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    (promised,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    public = {it for it in defined(MODULES[name]) if not it.startswith("_")}
    assert public <= set(promised)


def test_the_doors() -> None:
    """These modules are for users; a new one is added here on purpose."""
    assert sorted(PUBLIC) == [
        "",
        "aio",
        "conformance",
        "stores",
        "stores.azure",
        "stores.dynamodb",
        "stores.gcs",
        "stores.memory",
        "stores.netlify",
        "stores.object_store",
        "stores.redis",
        "stores.s3",
        "stores.sql",
        "stores.sqlite",
        "testing",
    ]


EXPORTED = [(joblock, name) for name in joblock.__all__] + [(aio, name) for name in aio.__all__]


@pytest.mark.parametrize(("module", "name"), EXPORTED)
def test_no_public_name_tells_of_a_private_file(module: object, name: str) -> None:
    """Pickles, reprs and tracebacks outlive the way the files are laid out."""
    it = getattr(module, name)
    home = getattr(it, "__module__", "joblock")
    assert "._" not in home
    if isinstance(it, type) or inspect.isfunction(it):
        assert home.startswith("joblock")
        assert pickle.loads(pickle.dumps(it)) is it  # noqa: S301
        assert typing.get_type_hints(it) is not None


@pytest.mark.parametrize("name", [it for it in PUBLIC if it.startswith("stores.")])
def test_what_a_store_module_promises_is_there(name: str) -> None:
    """Each name in `__all__` can be imported, where its SDK is installed."""
    pytest.importorskip(
        {
            "stores.s3": "boto3",
            "stores.azure": "azure.storage.blob",
            "stores.gcs": "google.cloud.storage",
            "stores.redis": "redis",
            "stores.sql": "sqlalchemy",
            "stores.dynamodb": "boto3",
            "stores.object_store": "obstore",
        }.get(name, "joblock")
    )
    module = import_module(f"joblock.{name}")
    assert all(hasattr(module, it) for it in module.__all__)


def test_every_module_of_the_package_is_found() -> None:
    """By its files, as by the import system."""
    walked = {
        it.name.removeprefix("joblock.")
        for it in pkgutil.walk_packages([str(PACKAGE)], "joblock.", onerror=lambda _: None)
    }
    assert {*walked, ""} == set(MODULES)


def test_import_joblock_is_enough_to_reach_aio() -> None:
    """It is imported when it is asked for, not before: asyncio is half of a start."""
    code = (
        "import sys, joblock; assert 'asyncio' not in sys.modules; assert 'aio' in dir(joblock);"
        "print(joblock.aio.acquire_job_lock.__module__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert ran.stdout.strip() == "joblock.aio"
    assert "aio" in dir(joblock)
    assert joblock.__getattr__("aio") is aio  # pyright: ignore
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        joblock.nonsense  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
