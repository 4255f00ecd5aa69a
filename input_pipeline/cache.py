"""Tokens kept on disk from one run to the next: written piece by piece, memory-mapped when read.

An entry is a folder named by the hash of everything that its contents follow from. It holds raw little-endian arrays,
one a file, and `header.json` with their types, sizes and checksums. It is written under another name and renamed when
it is whole, so that a reader sees all of it or nothing, and several processes may write the same one at once: the
first to finish wins. What does not fit its header is discarded and made anew.

Nothing here is ever needed again: to clear the cache, remove its folder, or the entries last used too long ago
(`find <folder> -maxdepth 1 -mtime +30`; a hit renews the time of its folder).
"""

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash

from input_pipeline.examples import RowError
from input_pipeline.sources import Rows, read

VERSION = 1  # of the layout, and of what rows are made into: raise it with either

log = logging.getLogger(__name__)

_HEADER = "header.json"
_READ_THROUGH = 2**30  # entries of up to so many bytes are hashed whenever they are opened (0.2 s); larger ones sized
_ABANDONED = 24 * 3600  # seconds after which nobody is writing any more


class Entry(NamedTuple):
    """Arrays by name, read-only and memory-mapped, and what was said of them."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


def key_of(*parts: Any) -> str:
    """The name of an entry: a hash of JSON-able parts, or of what makes them up in bytes."""
    digest = xxhash.xxh3_128(str(VERSION).encode())
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=repr).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def rows_hash(rows: Rows, picked: np.ndarray) -> str:
    """A hash of rows: of their fingerprint, or where they have none of those that are picked."""
    if rows.fingerprint is not None:
        # A slice of a file, or lines read in another way, have the file's own fingerprint.
        ends = [0, len(rows) - 1] if len(rows) else []
        return key_of(rows.fingerprint, len(rows), *([rows.where(i), repr(_as_stored(rows, i))] for i in ends))
    digest = xxhash.xxh3_128()
    for index in picked.tolist():
        digest.update(_as_stored(rows, index) + b"\n")
    return digest.hexdigest()


def _as_stored(rows: Rows, index: int) -> bytes:
    """A row, or the error of reading it, as a line of bytes."""
    try:
        row = read(rows, index)
    except RowError as error:
        row = ["unreadable", str(error)]
    try:
        plain = json.dumps(row, default=lambda x: x.tolist() if hasattr(x, "tolist") else repr(x))
    except (TypeError, ValueError):  # keys that JSON does not have, or a circle: the row will be refused
        plain = repr(row)
    return plain.encode("utf-8", "surrogatepass")


def load(folder: Path, key: str) -> Entry | None:
    """The entry `key` of a cache folder; None if there is none, or only a damaged one, which is removed."""
    path = folder / key
    try:
        entry = _open(path)
    except FileNotFoundError as error:
        if not path.exists():
            return None
        damage: Exception = error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        damage = error
    else:
        with contextlib.suppress(OSError):  # a cache may be read-only
            os.utime(path)
        return entry
    log.warning("the token cache entry %s is damaged (%s) and is made anew", path, damage)
    _discard(path)
    return None


class Writing:
    """An entry being written: `append` pieces to its arrays, `finish` with what is to be said of them.

    As a context manager it leaves nothing behind unless it was finished. `dtypes` gives the arrays; `columns` those of
    them that are two-dimensional. All are stored little-endian.
    """

    def __init__(self, folder: Path, key: str, dtypes: Mapping[str, Any], *, columns: Mapping[str, int] | None = None):
        self._target = folder / key
        self._columns = dict(columns or {})
        self._dtypes = {name: np.dtype(dtype).newbyteorder("<") for name, dtype in dtypes.items()}
        with _writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            self._path = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder))
            self._files: dict[str, BinaryIO] = {
                name: open(self._path / f"{name}.bin", "wb")  # noqa: SIM115 (closed in __exit__)
                for name in dtypes
            }
        self._digests = {name: xxhash.xxh3_128() for name in dtypes}

    def __enter__(self) -> "Writing":
        return self

    def __exit__(self, *error: Any) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk: that was said when it was written to
                file.close()
        shutil.rmtree(self._path, ignore_errors=True)

    def append(self, name: str, piece: np.ndarray) -> None:
        """Write a piece of an array after those before it."""
        data = np.ascontiguousarray(piece, self._dtypes[name]).reshape(-1).data
        self._digests[name].update(data)
        with _writable(self._target.parent):
            self._files[name].write(data)

    def finish(self, facts: Mapping[str, Any]) -> Entry:
        """Make the entry visible; `facts` is JSON. Where another process was first, the entry is that one's."""
        with _writable(self._target.parent):
            self._settle(facts)
            return self._publish()

    def _settle(self, facts: Mapping[str, Any]) -> None:
        """Everything to the disk, the header last."""
        arrays = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            arrays[name] = {
                "dtype": self._dtypes[name].str,
                "columns": self._columns.get(name),
                "bytes": file.tell(),
                "xxh3_128": self._digests[name].hexdigest(),
            }
        header = {"version": VERSION, "arrays": arrays, "facts": dict(facts)}
        with open(self._path / _HEADER, "w", encoding="utf-8") as written:
            json.dump({"header": header, "xxh3_128": _checksum(header)}, written, indent=1)
            written.flush()
            os.fsync(written.fileno())

    def _publish(self) -> Entry:
        for _ in range(10):
            with contextlib.suppress(OSError):  # a folder cannot be renamed to one that holds files
                os.rename(self._path, self._target)
                _sync(self._target.parent)
            entry = load(self._target.parent, self._target.name)
            if entry is not None:
                return entry
        raise OSError("it cannot be read back")


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the token cache {folder} cannot be written ({error}); set training.token_cache_dir to another folder,"
            " or to null: then all tokens are held in memory"
        ) from error


def _open(path: Path) -> Entry:
    stored = json.loads((path / _HEADER).read_text(encoding="utf-8"))
    header = stored["header"]
    if stored["xxh3_128"] != _checksum(header):
        raise ValueError("its header does not fit its checksum")
    if header["version"] != VERSION:
        raise ValueError(f"it has version {header['version']}, not {VERSION}")
    thorough = sum(array["bytes"] for array in header["arrays"].values()) <= _READ_THROUGH
    return Entry(
        {name: _map(path / f"{name}.bin", array, thorough) for name, array in header["arrays"].items()}, header["facts"]
    )


def _map(file: Path, array: Mapping[str, Any], thorough: bool) -> np.ndarray:
    size = file.stat().st_size
    if size != array["bytes"]:
        raise ValueError(f"{file.name} has {size:,} bytes of {array['bytes']:,}")
    dtype = np.dtype(array["dtype"])
    if dtype.kind not in "biuf":
        raise ValueError(f"{file.name} is of type {dtype}")
    mapped: np.ndarray = np.memmap(file, dtype, "r") if size else np.empty(0, dtype)  # nothing cannot be mapped
    if thorough and xxhash.xxh3_128(mapped.data).hexdigest() != array["xxh3_128"]:
        raise ValueError(f"{file.name} does not fit its checksum")
    return mapped if array["columns"] is None else mapped.reshape(-1, array["columns"])


def _checksum(header: Any) -> str:
    return xxhash.xxh3_128(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _discard(path: Path) -> None:
    """Remove an entry at once for everybody, however long deleting its files takes."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    with contextlib.suppress(OSError):  # another process was faster
        os.rename(path, aside / "damaged")
    shutil.rmtree(aside, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what a run that was killed has left half-written."""
    for path in folder.glob(".*-*"):
        with contextlib.suppress(OSError):  # another process was faster
            last = max(os.stat(file).st_mtime for file in (path, *path.iterdir()))
            if time.time() - last > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
