"""The house rules that a program can hold: who imports what, what may be heavy, how long a file is, what it names.

ARCHITECTURE.md says them in words. Everything is read with `ast`; nothing is imported.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "configs": set(),
    "models": set(),
    "input_pipeline": set(),
    "trainers": {"models", "input_pipeline"},
    "launch": {"configs", "models", "input_pipeline", "trainers"},
}
HEAVY = {
    "jax",
    "flax",
    "optax",
    "orbax",
    "grain",
    "transformers",
    "datasets",
    "torch",
    "matplotlib",
    "wandb",
    "tensorboardX",
}
ORACLES = {"torch", "trl", "peft", "accelerate"}  # of tests and benchmarks
COMPARES = {"launch.parity_torch"}  # what `einkorn parity` alone imports
FORBIDDEN = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}
LIGHT = ("launch.cli", "launch.__main__")  # and all of configs
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
LONGEST = 450


def test_each_folder_imports_what_the_table_allows_and_nothing_else():
    wrong = [
        f"{module} imports {name}"
        for module in _modules()
        for name in _imports(module)
        if (room := name.split(".")[0]) in MAY_IMPORT
        and room != (own := module.split(".")[0])
        and room not in MAY_IMPORT[own]
    ]
    assert not wrong


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_there_is_no_circle_inside_a_folder(room):
    inside = {module: _ours(_imports(module)) for module in _modules() if module.split(".")[0] == room}
    circle = _circle({module: [name for name in names if name in inside] for module, names in inside.items()})
    assert not circle, " → ".join(circle)


def test_nothing_heavy_is_imported_before_a_command_runs():
    starts = [*LIGHT, *(module for module in _modules() if module.split(".")[0] == "configs")]
    wrong = [
        f"{module} imports {name} at its top"
        for module in sorted(_reached(starts))
        for name in _imports(module, top=True)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong


def test_loading_a_configuration_brings_in_nothing_heavy():
    code = "import sys, configs.load, launch.cli; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not HEAVY & set(loaded.stdout.split())


def test_only_tests_benchmarks_and_the_parity_command_import_the_oracles():
    wrong = [
        f"{module} imports {name}"
        for module in _modules()
        if module not in COMPARES
        for name in _imports(module)
        if name.split(".")[0] in ORACLES
    ]
    assert not wrong


def test_nothing_is_unpickled_evaluated_or_executed():
    wrong = [
        f"{module} imports {name}"
        for module in _modules()
        for name in _imports(module)
        if name.split(".")[0] in FORBIDDEN
    ]
    wrong += [
        f"{module}:{node.lineno} calls {node.func.id}"
        for module in _modules()
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec")
    ]
    assert not wrong


def test_no_module_has_a_name_that_says_nothing():
    assert not [module for module in _modules() if VAGUE & set(module.split("."))]


def test_no_file_is_longer_than_a_sitting():
    lengths = {str(file.relative_to(ROOT)): len(_text(file).splitlines()) for file in _files() if file.suffix == ".py"}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_every_benchmark_stands_in_the_table_of_them():
    table = _text(ROOT / "benchmarks/README.md")
    commands = [file.stem for file in (ROOT / "benchmarks").glob("*.py") if '"__main__"' in _text(file)]
    assert not [name for name in commands if not re.search(rf"`python (-m )?benchmarks[./]{name}(\.py)?`", table)]


def test_every_module_begins_by_saying_what_it_is():
    assert not [module for module in _modules() if not ast.get_docstring(_tree(module))]


def test_no_file_names_the_machine_it_was_written_on():
    # Written in pieces, or this file would name them.
    places = re.compile(r"(?<![\w.~*-])/(" + "|".join(("work", "root", "tmp")) + r")/")
    names = [places, *(re.compile(re.escape(host)) for host in _registries())]
    wrong = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for file in _files()
        for number, line in enumerate(_text(file).splitlines(), start=1)
        if any(name.search(line) for name in names)
    ]
    assert not wrong


def _registries() -> set[str]:
    """Hosts of the package registries this machine uses instead of the public ones."""
    urls = [
        value for name, value in os.environ.items() if re.search(r"(INDEX_URL|REGISTRY|PROXY)$", name, re.IGNORECASE)
    ]
    for folder in (Path("/etc"), Path.home() / ".config" / "pip", Path.home() / ".pip"):
        urls += [_text(folder / "pip.conf")] if (folder / "pip.conf").is_file() else []
    hosts = {
        host.rpartition("@")[2].partition(":")[0] for url in urls for host in re.findall(r"https?://([^/\s]+)", url)
    }
    return {host for host in hosts if "." in host} - {"pypi.org", "registry.npmjs.org", "127.0.0.1"}


@cache
def _files() -> tuple[Path, ...]:
    """Every text file of the project that git knows, or would."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = (ROOT / name for name in listed.stdout.splitlines())
    return tuple(file for file in files if file.is_file() and b"\0" not in file.read_bytes())


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@cache
def _modules() -> dict[str, Path]:
    """Every module of the five folders; a package stands under its folder's name."""
    found = {}
    for room in MAY_IMPORT:
        for file in sorted((ROOT / room).rglob("*.py")):
            words = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(words[:-1] if words[-1] == "__init__" else words)] = file
    return found


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_text(_modules()[module]))


@cache
def _imports(module: str, top: bool = False) -> tuple[str, ...]:
    """What a module imports, `a.b` for `from a import b` too; with `top`, only what its own import runs."""
    names = []
    for node in _statements(_tree(module)) if top else ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += _from(module, node)
    return tuple(names)


def _from(module: str, node: ast.ImportFrom) -> list[str]:
    above = module.split(".")
    package = above if _modules()[module].name == "__init__.py" else above[:-1]
    start = package[: len(package) - node.level + 1] if node.level else []
    source = ".".join([*start, *([node.module] if node.module else [])])
    return [source, *(f"{source}.{alias.name}" for alias in node.names)]


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs on import: not the bodies of functions, nor what stands under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _statements(node)


def _ours(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name in _modules()]


def _reached(starts: list[str]) -> set[str]:
    """Modules of ours that importing these imports, with the packages they stand in."""
    reached, rest = set(), list(starts)
    while rest:
        module = rest.pop()
        if module not in reached:
            reached.add(module)
            rest += _ours((*_imports(module, top=True), module.rpartition(".")[0]))
    return reached


def _circle(graph: dict[str, list[str]]) -> list[str]:
    """A circle of the graph, first and last the same, or nothing."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in graph[node]:
            if found := walk(following, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in graph if (found := walk(node, []))), [])
