"""What a compiled program says to other devices: its collectives, read from the text of its HLO.

A loop's body is counted as often as it runs: as XLA says, or by the constant that its condition compares with, as every
scan's does. What a TPU's compiler cuts into pieces, to send some while others are multiplied, is one collective by its
channel; an all-reduce of which each device keeps a part is a reduce-scatter.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
SCATTERED = "all-reduce-scatter"  # in the name of such a computation
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One kind of collective: how many a step runs, and the bytes of what they give each device."""

    runs: int
    bytes: float


def collectives(text: str) -> dict[str, Collective]:
    """The collectives of a compiled program by kind, over one run of it; those that it has none of are left out."""
    bodies = dict(_computations(text))
    entry = next(re.match(r"^ENTRY %?([\w.\-]+)", line)[1] for line in text.splitlines() if line.startswith("ENTRY"))  # type: ignore[index]
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    whole = {
        found.channel: found for found in sorted(_walk(entry, bodies, 1), key=lambda found: found.bytes * found.times)
    }
    for found in whole.values():
        counts[found.kind] += found.times
        sizes[found.kind] += found.bytes * found.times
    return {kind: Collective(counts[kind], sizes[kind]) for kind in KINDS if counts[kind]}


class _One(NamedTuple):
    """A collective in the text: its kind, bytes, how often it runs, and what its pieces have in common."""

    kind: str
    bytes: int
    times: int
    channel: str


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each computation's name and lines."""
    name, lines = "", list[str]()
    for line in text.splitlines():
        if (begun := _COMPUTATION.match(line)) and not line.startswith(" "):
            name, lines = begun[1], []
        elif line.startswith("}") and name:
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _walk(name: str, bodies: Mapping[str, list[str]], times: int) -> Iterator[_One]:
    """Every collective that runs where a computation runs so many times."""
    for number, line in enumerate(bodies.get(name, ())):
        if found := _COLLECTIVE.search(line):
            kind = "reduce-scatter" if found[2] == "all-reduce" and SCATTERED in name else found[2]
            channel = _CHANNEL.search(line)
            yield _One(kind, _received(found[1], line), times, channel[0] if channel else f"{name} {number}")
            continue
        inside = times * (_trips(line, bodies) if " while(" in line else 1)
        called = _CALLED.findall(line)
        if branches := _BRANCHES.search(line):
            called += [each.strip().lstrip("%") for each in branches[1].split(",")]
        for each in called:
            yield from _walk(each, bodies, inside)


def _trips(line: str, bodies: Mapping[str, list[str]]) -> int:
    """How often a loop runs; once, where that is not to be seen."""
    if said := _TRIPS.search(line):
        return int(said[1])
    condition = _CONDITION.search(line)
    bounds = [int(n) for each in bodies.get(condition[1], ()) for n in _BOUND.findall(each)] if condition else []
    return max(bounds, default=1)


def _received(shape: str, line: str) -> int:
    """The bytes of a collective's result; of one that is only started, of the largest thing that it holds."""
    sizes = [BYTES.get(dtype, 4) * _product(dims) for dtype, dims in _SHAPE.findall(shape)]
    return max(sizes, default=0) if "-start(" in line else sum(sizes)


def _product(dims: str) -> int:
    total = 1
    for each in filter(None, dims.split(",")):
        total *= int(each)
    return total
