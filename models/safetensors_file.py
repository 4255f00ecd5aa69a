"""The safetensors container: eight bytes of header length, a JSON header, then the tensors' bytes one after another.

Written as a stream (one tensor in memory at a time) and read by byte ranges (only what a shard needs); the safetensors
package's numpy functions want a whole file's tensors at once for writing, and keep what they mapped for reading.
The format: https://huggingface.co/docs/safetensors
"""

import io
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
STRIP_ROWS, STRIP_BYTES = 64, 1 << 20  # of a tensor, read together at most
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit, so that a broken file cannot ask for all memory


def read_header(file: Path) -> dict[str, "Stored"]:
    """Lists the tensors of one file: name → where its bytes lie.

    Raises ValueError, naming the file, when it is cut short, is no safetensors file, or holds numbers we do not read.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else LARGEST_HEADER + 1
        if length > min(LARGEST_HEADER, size - 8):
            raise ValueError(f"{file}: not a safetensors file, or cut short ({size} bytes); download it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file}: its safetensors header is not JSON ({error}); download it again") from None
    header.pop("__metadata__", None)
    tensors = {name: _stored(file, name, entry, 8 + length) for name, entry in header.items()}
    end = max((tensor.start + tensor.nbytes for tensor in tensors.values()), default=0)
    if end > size:
        raise ValueError(f"{file}: cut short: its header speaks of {end} bytes, the file has {size}; download it again")
    return tensors


def copy_rows(tensor: "Stored", index: tuple[slice, ...], target: np.ndarray) -> None:
    """Copies `tensor[index]` (slices of step one) into `target`, casting; only these rows of the file are read.

    They come in strips that stay in the processor's cache while they are cast and turned: as a whole, or through a
    mapping of the file with its page faults, it takes twice the time.
    """
    start, stop, _ = index[0].indices(tensor.shape[0])
    row_bytes = tensor.nbytes // max(tensor.shape[0], 1)
    most = max(1, min(STRIP_ROWS, STRIP_BYTES // max(row_bytes, 1)))
    buffer = np.empty(most * row_bytes, np.uint8)
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.start + start * row_bytes)
        for first in range(start, stop, most):
            rows = min(most, stop - first)
            piece = buffer[: rows * row_bytes]
            _fill(piece, file)
            strip = piece.view(tensor.dtype).reshape(rows, *tensor.shape[1:])
            target[first - start : first - start + rows] = strip[(slice(None), *index[1:])].astype(
                target.dtype, copy=False
            )


def _fill(piece: np.ndarray, file: io.RawIOBase) -> None:
    """Read until the piece is full: one read may bring less."""
    view, done = piece.data, 0
    while done < len(view):
        if not (count := file.readinto(view[done:])):
            raise ValueError(f"{getattr(file, 'name', 'a file of weights')} ends before its tensors do")
        done += count


def write_tensors(
    file: Path, specs: Mapping[str, "Spec"], tensor: Callable[[str], np.ndarray], *, metadata: Mapping[str, str]
) -> None:
    """Writes the tensors of `specs` in their order, asking `tensor(name)` for each only when its turn comes.

    The bytes are on disk when this returns.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": _code(spec.dtype),
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins on an eight-byte boundary, as readers that map the file like it
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, spec in specs.items():
            array = tensor(name)
            assert (array.shape, array.dtype) == spec, f"{name}: {array.dtype}{array.shape} given for {spec}"
            stream.write(np.ascontiguousarray(array).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def _stored(file: Path, name: str, entry: dict[str, Any], data: int) -> "Stored":
    if entry["dtype"] not in DTYPES:
        raise ValueError(
            f"{file}: tensor {name} is stored as {entry['dtype']}; allowed: {', '.join(DTYPES)} "
            "(quantised checkpoints must be dequantised first)"
        )
    begin, end = entry["data_offsets"]
    tensor = Stored(file, tuple(entry["shape"]), DTYPES[entry["dtype"]], data + begin)
    if tensor.nbytes != end - begin:
        raise ValueError(
            f"{file}: tensor {name} has {end - begin} bytes, its shape {tensor.shape} needs {tensor.nbytes}"
        )
    return tensor


def _code(dtype: np.dtype[Any]) -> str:
    return next(code for code, known in DTYPES.items() if known == dtype)


class Spec(NamedTuple):
    """A tensor yet to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Stored(NamedTuple):
    """A tensor lying in a file: `start` is the offset of its first byte from the file's beginning."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize
