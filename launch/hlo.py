"""What a compiled program says to other devices: its collectives, read from the text of its HLO.

A loop's body is counted as often as it runs: as XLA says, or by the constant that its condition compares with and what
its body adds to the counter, as of every scan, and of the products that TPUs cut up to send parts of a matrix while
others are multiplied. A collective that is cut into pieces is one, by its channel; an all-reduce of which each device
keeps a part is a reduce-scatter. What only one device takes part in is none.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BODY = re.compile(r"body=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")
_COUNTER = re.compile(r"ROOT .* compare\(%([\w.\-]+), %[\w.\-]+\), direction=LT")
_PART = re.compile(r"%([\w.\-]+) = \S+ get-tuple-element\(.*\), index=(\d+)")
_ADDED = re.compile(r"%([\w.\-]+) = \S+ add\(%([\w.\-]+), %([\w.\-]+)\)")
_CONSTANT = re.compile(r"%([\w.\-]+) = \S+ constant\((\d+)\)")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_NAME = re.compile(r'op_name="([^"]*)"')
MANY = 1 << 30  # devices, where a program does not say how many
SCATTERED = "all-reduce-scatter"  # in the name of such a computation
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One kind of collective: how many a step runs, the bytes of what they give each device, and the bytes that each
    device sends for them around a ring, which is the least.
    """

    runs: int
    bytes: float
    sent: float


def collectives(text: str) -> dict[str, Collective]:
    """The collectives of a compiled program by kind, over one run of it; those that it has none of are left out."""
    bodies = dict(_computations(text))
    entry = next(re.match(r"^ENTRY %?([\w.\-]+)", line)[1] for line in text.splitlines() if line.startswith("ENTRY"))  # type: ignore[index]
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    whole: dict[str, _One] = {}
    for found in _walk(entry, bodies, 1):
        other = whole.get(found.channel, found)  # a piece, which may run in each turn of what it runs beside
        whole[found.channel] = max(found, other, key=lambda one: one.bytes)._replace(
            times=min(found.times, other.times), sent=max(found.sent, other.sent)
        )
    for found in whole.values():
        counts[found.kind] += found.times
        sizes[found.kind] += found.bytes * found.times
        sent[found.kind] += round(found.sent * found.times)
    return {kind: Collective(counts[kind], sizes[kind], sent[kind]) for kind in KINDS if counts[kind]}


class _One(NamedTuple):
    """A collective in the text: its kind, bytes, how often it runs, what its pieces have in common, and bytes sent."""

    kind: str
    bytes: int
    times: int
    channel: str
    sent: float


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each computation's name and lines; a kernel among these brings lines of its own, with any brackets."""
    name, lines = "", list[str]()
    for line in text.splitlines():
        if begun := _COMPUTATION.match(line):
            yield name, lines
            name, lines = begun[1], []
        else:
            lines.append(line)
    yield name, lines


def _walk(name: str, bodies: Mapping[str, list[str]], times: int) -> Iterator[_One]:
    """Every collective that runs where a computation runs so many times."""
    before: Counter[str] = Counter()
    for number, line in enumerate(bodies.get(name, ())):
        if found := _COLLECTIVE.search(line):
            kind = "reduce-scatter" if found[2] == "all-reduce" and SCATTERED in name else found[2]
            channel, group = _channel(line, before) or f"{name} {number}", _group(line)
            if group > 1:
                size = _received(found[1], line)
                yield _One(kind, size, times, channel, _sent(found[2], kind, size, group))
            continue
        inside = times * (_trips(line, bodies) if " while(" in line else 1)
        called = _CALLED.findall(line)
        if branches := _BRANCHES.search(line):
            called += [each.strip().lstrip("%") for each in branches[1].split(",")]
        for each in called:
            yield from _walk(each, bodies, inside)


def _channel(line: str, before: Counter[str]) -> str | None:
    """What pieces of a collective have in common: its channel; of those of `jax.shard_map`, which all have one and the
    same, also their operation, and the how many-th of it this is in its computation.
    """
    if (channel := _CHANNEL.search(line)) is None:
        return None
    if (name := _NAME.search(line)) is None or "/shard_map/" not in name[1]:
        return channel[0]
    before[name[1]] += 1
    return f"{channel[0]} {name[1]} {before[name[1]]}"


def _trips(line: str, bodies: Mapping[str, list[str]]) -> int:
    """How often a loop runs; once, where that is not to be seen."""
    if said := _TRIPS.search(line):
        return int(said[1])
    condition, body = _CONDITION.search(line), _BODY.search(line)
    if condition is None or body is None:
        return 1
    lines = bodies.get(condition[1], [])
    bounds = [int(n) for each in lines for n in _BOUND.findall(each)]
    return -(-max(bounds, default=1) // _stride(lines, bodies.get(body[1], [])))


def _stride(condition: list[str], body: list[str]) -> int:
    """What a turn adds to the counter: 2 where XLA has made one turn of two."""
    root = next((found[1] for line in condition if (found := _COUNTER.search(line))), "")
    part = next((found[2] for line in condition if (found := _PART.search(line)) and found[1] == root), None)
    result = next((line for line in body if line.lstrip().startswith("ROOT ") and " tuple(" in line), "")
    carried = re.findall(r"%([\w.\-]+)", result.partition(" tuple(")[2].partition(")")[0])
    if part is None or int(part) >= len(carried):
        return 1
    counters = {found[1] for line in body if (found := _PART.search(line)) and found[2] == part}
    constants = {found[1]: int(found[2]) for line in body if (found := _CONSTANT.search(line))}
    added = (found for line in body if (found := _ADDED.search(line)) and found[1] == carried[int(part)])
    return max(1, next((constants.get(each[3], 1) for each in added if each[2] in counters), 1))


def _group(line: str) -> int:
    """How many devices take part together; where it is not said, or in pairs, more than one."""
    if axes := _AXES.search(line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']*)'=(\d+)", axes[1])}
        used = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in used)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=", line):
        return int(iota[1].split(",")[-1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(listed[1].split(",")) if listed else MANY


def _sent(written: str, kind: str, size: int, group: int) -> float:
    """Bytes that a device sends for a collective whose result has this size; `written` is what the text calls it."""
    share = (group - 1) / group
    if kind == "all-reduce":
        return 2 * share * size
    if kind == "collective-permute":
        return size
    return size * (group - 1) if written == "reduce-scatter" else size * share  # the result is a part, or all


def _received(shape: str, line: str) -> int:
    """The bytes of a collective's result; of one that is only started, of the largest thing that it holds."""
    sizes = [
        BYTES.get(dtype, 4) * math.prod(map(int, filter(None, dims.split(","))))
        for dtype, dims in _SHAPE.findall(shape)
    ]
    return max(sizes, default=0) if "-start(" in line else sum(sizes)
