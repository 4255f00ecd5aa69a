"""A key that says "used" is read somewhere, and no code reads a key that is not there.

Code reads a key as `section.key`: `config.training.seed`, `training.seed`, `config.data[split].pack`,
`entry.get("split")`. What stands for a section is its own name, or one of OWNERS.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from configs.default import SCHEMA
from configs.key import USED, Key, Same, leaves

ROOMS = ("input_pipeline", "launch", "models", "trainers")
OWNERS = {
    "train": {"train", "validation", "split"},
    "validation": {"train", "validation", "split"},
    "datasets[]": {"dataset", "entry"},
    "trainer_kwargs": {"trainer_kwargs", "kwargs"},
}
BY_VARIABLE = {"mesh"}  # sections read whole, as in config.mesh[axis]
SECTIONS = ("model", "data", "training", "peft", "fsdp", "deepspeed", "mesh")


def test_every_key_that_is_used_is_read(root):
    read = set(_reads(root))
    unread = [path for path, key in leaves(SCHEMA) if _must_be_read(key) and not _is_read(path, read)]
    assert not unread, f"marked as used and read nowhere: {', '.join(unread)}"


def test_no_code_reads_a_key_that_is_not_there(root):
    unknown = [f"{place}: {'.'.join(map(str, chain))}" for place, chain in _config_chains(root) if not _exists(chain)]
    assert not unknown, f"no such key: {', '.join(unknown)}"


def _must_be_read(key) -> bool:
    return isinstance(key, Key) and key.effect == USED and not key.only


def _is_read(path: str, read: set[tuple[str, str]]) -> bool:
    *_, parent, name = path.split(".")
    return any((owner, name) in read for owner in OWNERS.get(parent, {parent})) or parent in BY_VARIABLE


def _files(root: Path) -> list[Path]:
    return [*(file for room in ROOMS for file in sorted((root / room).rglob("*.py"))), root / "configs" / "derived.py"]


def _chains(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Every `a.b["c"].get("d")` of a file, as its line and words; a word that is not written out is None."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute | ast.Subscript | ast.Call) and len(words := _words(node)) > 1:
            yield node.lineno, words


def _words(node: ast.AST) -> list[str | None]:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [*_words(node.value), node.attr]
    if isinstance(node, ast.Subscript):
        return [*_words(node.value), _constant(node.slice)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
        return [*_words(node.func.value), _constant(node.args[0])]
    return [None]


def _constant(node: ast.AST) -> str | None:
    return str(node.value) if isinstance(node, ast.Constant) else None


def _reads(root: Path) -> Iterator[tuple[str | None, str | None]]:
    """Each (owner, name); what `data[variable]` gives is a split."""
    for file in _files(root):
        for _, words in _chains(file):
            owner = "split" if words[-2] is None and words[-3:-2] == ["data"] else words[-2]
            yield owner, words[-1]


def _config_chains(root: Path) -> Iterator[tuple[str, list[str | None]]]:
    """What follows `config.` where that is a configuration's section."""
    for file in _files(root):
        for line, words in _chains(file):
            rest = words[words.index("config") + 1 :] if "config" in words else []
            if rest and rest[0] in SECTIONS:
                yield f"{file.relative_to(root)}:{line}", rest


def _exists(chain: list[str | None]) -> bool:
    """Whether the words lead into the schema; what follows a key, or a word not written out, is not looked at."""
    entry = SCHEMA
    for word in chain:
        if word is None or not isinstance(entry, dict) or word in dir(dict) or word == "to_dict":
            return True
        if word not in entry or isinstance(entry[word], Same):
            return False
        entry = entry[word]
    return True
