"""Accelerators that a run can be planned for: what a chip can do, and how many of them a name means.

Peaks are dense bfloat16. Sources: Google Cloud's pages of TPU v4, v5e, v5p and v6e ("system architecture"), where
bandwidth between chips is the sum over all links of a chip, and that between slices a pod's by its chips (of v4 and v5p
a host's 200 Gb/s by its four); NVIDIA's data sheets of the A100 and H100 SXM (NVLink). HBM is what a program may use of
it, as libtpu and CUDA leave it.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator: bfloat16 FLOP/s, bytes of HBM that a program may use, bytes/s of HBM and, to other chips, of all
    its links together; for a TPU its name in libtpu's topologies, how many dimensions these have, whether a target's
    number counts two cores a chip, and bytes/s to other slices.
    """

    flops: float
    hbm: float
    hbm_rate: float
    link_rate: float
    tpu: str | None = None
    dimensions: int = 2
    cores: int = 1
    slice_rate: float = 0.0


CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1.228e12, 300e9, "v4", 3, cores=2, slice_rate=6.25e9),
    "v5e": Chip(197e12, 15.75 * GIB, 0.819e12, 200e9, "v5e", slice_rate=3.125e9),
    "v5p": Chip(459e12, 95.0 * GIB, 2.765e12, 600e9, "v5p", 3, cores=2, slice_rate=6.25e9),
    "v6e": Chip(918e12, 31.25 * GIB, 1.64e12, 448e9, "v6e", slice_rate=12.5e9),
    "a100": Chip(312e12, 77.0 * GIB, 2.039e12, 300e9),
    "h100": Chip(989.4e12, 77.0 * GIB, 3.35e12, 450e9),
    "h200": Chip(989.4e12, 138.0 * GIB, 4.8e12, 450e9),
}
ALIASES = {"v5litepod": "v5e"}


class Target(NamedTuple):
    """So many chips of a kind; `topology` is libtpu's name for those of a slice, None for a GPU."""

    name: str
    chip: Chip
    chips: int
    topology: str | None
    slices: int = 1


def target_of(name: str) -> Target:
    """What `v5e-16`, `2xv5e-16` (two slices), `v5p-128` or `8xh100` means; ValueError says what can be asked for."""
    gpu, tpu = re.fullmatch(r"(\d+)x(\w+)", name.lower()), re.fullmatch(r"(?:(\d+)x)?(\w+)-(\d+)", name.lower())
    kind, number = (gpu[2], int(gpu[1])) if gpu else (tpu[2], int(tpu[3])) if tpu else ("", 0)
    slices = int(tpu[1] or 1) if tpu else 1
    chip = CHIPS.get(ALIASES.get(kind, kind))
    if chip is None or (chip.tpu is None) != (gpu is not None) or min(number, slices) < 1 or number % chip.cores:
        known = ", ".join(CHIPS)
        raise ValueError(
            f"--target {name!r}: give a TPU as v5e-16, 2xv5e-16 (two slices) or v5p-128 (v4 and v5p count two cores a "
            f"chip), GPUs as 8xh100; there are {known}"
        )
    count = number // chip.cores
    topology = None if chip.tpu is None else f"{chip.tpu}:{_shape(count, chip.dimensions, name)}"
    return Target(name, chip, slices * count, topology, slices)


def _shape(count: int, dimensions: int, name: str) -> str:
    """The sides of a slice, as equal as powers of two can be, the last one the longest."""
    if count & (count - 1):
        raise ValueError(f"--target {name!r}: a slice has a power of two of chips, and this one {count}")
    sides, bits = [1] * dimensions, count.bit_length() - 1
    if dimensions == 3 and bits == 2:
        return "2x2x1"
    for bit in range(bits):
        sides[-1 - bit % dimensions] *= 2
    return "x".join(map(str, sides))
