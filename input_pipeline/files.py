"""Which files a path means, and their bytes: one file, a folder, a pattern; here, or in another store."""

import contextlib
import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from input_pipeline.examples import RowError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "json",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".array_record": "array_record",
}
CODECS = (".gz", ".zst")  # of jsonl, json and text
ON_DISK = (
    ".jsonl, .json (a list), .txt (these also as .gz or .zst), .parquet, .arrow, .array_record, a folder or pattern of"
    " them, or a folder written by datasets' save_to_disk"
)
_BESIDE = (".md", ".py", ".gitattributes", ".gitignore", ".lock", ".yaml", ".yml", ".crc")  # files that hold no rows
_NAMED = ("dataset_infos.json", "dataset_info.json", "state.json", "LICENSE", "_SUCCESS")
_DRIVERS = {"gs": "'einkorn[gcs]'", "gcs": "'einkorn[gcs]'", "s3": "s3fs", "abfs": "adlfs", "hf": "huggingface_hub"}


class File(NamedTuple):
    """A file: where it lies, of which kind, in which codec (".gz", ".zst" or "")."""

    path: str
    kind: str
    codec: str = ""

    @property
    def is_remote(self) -> bool:
        return "://" in self.path


def is_saved_dataset(path: str) -> bool:
    """Whether a folder was written by `save_to_disk` of datasets."""
    return any(os.path.exists(os.path.join(path, name)) for name in ("dataset_info.json", "dataset_dict.json"))


def files_of(path: str) -> list[File]:
    """The files that a path means, sorted by name; ValueError where there is none, or one that holds no rows."""
    found = _remote(path) if "://" in path else _local(os.path.expanduser(path))
    if len(found) == 1 and found[0] == path:
        return [_file(path)]
    named = [name for name in found if not _beside(name)]
    if not named:
        raise ValueError(f"dataset_path {path!r} has no file of rows; allowed: {ON_DISK}")
    return [_file(name) for name in sorted(named)]


def fingerprint(files: list[File]) -> str | None:
    """What changes when the files do: names, sizes, times; None where another store has them."""
    if any(file.is_remote for file in files):
        return None
    stats = [os.stat(file.path) for file in files]
    return repr([(os.path.abspath(f.path), s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True)])


def size(file: File) -> int:
    """Bytes of a file as it lies there."""
    if not file.is_remote:
        return os.path.getsize(file.path)
    system, name = _system(file.path)
    return int(system.size(name))


@contextlib.contextmanager
def opened(file: File) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked; RowError names it where it cannot be read."""
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(_raw(file.path))
            yield stack.enter_context(_unpacked(raw, file.codec)) if file.codec else raw
    except (OSError, EOFError, zlib.error) as error:
        raise RowError(f"{file.path} cannot be read: {error}", "unreadable") from error


def _unpacked(raw: BinaryIO, codec: str) -> Any:
    if codec == ".gz":
        return gzip.GzipFile(fileobj=raw)
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd"), 1 << 20)


def _raw(path: str) -> Any:
    if "://" not in path:
        return open(path, "rb")
    system, name = _system(path)
    return system.open(name, "rb")


def _system(path: str) -> tuple[Any, str]:
    """The file system of a path with a scheme, and the path in it."""
    import fsspec

    scheme = path.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        driver = f"; pip install {_DRIVERS[scheme]}" if scheme in _DRIVERS else ""
        raise ValueError(f"dataset_path {path!r}: {scheme}:// cannot be opened here ({error}){driver}") from None


def _remote(path: str) -> list[str]:
    system, name = _system(path)
    scheme = path.partition("://")[0]
    if glob.has_magic(name):
        names = system.glob(name)
    elif system.isdir(name):
        names = [each for each in system.find(name) if not _hidden(Path(each), name)]
    elif system.exists(name):
        return [path]
    else:
        raise ValueError(f"dataset_path {path!r} does not exist")
    return [f"{scheme}://{each.lstrip('/') if scheme != 'file' else each}" for each in names]


def _local(path: str) -> list[str]:
    if os.path.isdir(path):
        return [str(each) for each in Path(path).rglob("*") if each.is_file() and not _hidden(each, path)]
    if os.path.exists(path):
        return [path]
    if glob.has_magic(path):
        return [each for each in glob.glob(path, recursive=True) if os.path.isfile(each)]
    raise ValueError(f"dataset_path {path!r} does not exist (looked in {Path.cwd()})")


def _hidden(path: Path, folder: str) -> bool:
    return any(part.startswith(".") for part in path.parts[len(Path(folder).parts) :])


def _beside(path: str) -> bool:
    return path.endswith(_BESIDE) or os.path.basename(path) in _NAMED


def _file(path: str) -> File:
    stem, codec = next(((path.removesuffix(codec), codec) for codec in CODECS if path.endswith(codec)), (path, ""))
    suffix = os.path.splitext(stem)[1]
    kind = SUFFIXES.get(suffix)
    if kind is None or (codec and kind not in ("jsonl", "json", "text")):
        raise ValueError(f"Unsupported file format: {suffix + codec or 'no suffix'} of {path!r}; allowed: {ON_DISK}")
    return File(path, kind, codec)
