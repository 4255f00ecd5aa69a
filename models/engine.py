"""Many requests answered on a few slots: prompts are prefilled, slots are decoded in blocks of steps, and between
blocks those that have ended are given to requests that wait.

S slots, U prompts of one prefill, L tokens of a prompt, K stop ids. This is the host's side; models/slots.py is the
devices'.

A long answer does not hold the others, each row stands at its own length, and a prompt that several requests have is
prefilled once: its places in the cache are copied. What is drawn for a request depends on (seed, its number, position)
alone: not on its slot, its neighbours, the block length or the devices.
"""

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from models import slots
from models.decoder import Compute, DecoderConfig, Params
from models.decoding import for_decoding
from models.sampling import Drawn, Sampling, check_sampling
from models.sharding import replicas
from models.slots import NONE, Placement, Prefilled, Rows
from models.vision import Shown, most_looked_at, stacked

BUCKET = 64  # prompts and caches are padded to multiples of this at least, so that few shapes are compiled
FEWEST_PLACES = 256  # of a slot; from there on they double, while answers grow
AHEAD = 16  # prompts that are prefilled together, if there are so many
STOPS = 8  # stop ids are padded to a multiple of this


class Request(NamedTuple):
    """A prompt, the number that its draws depend on, how many tokens its answer has at most, and the prompt's pictures,
    one object for all requests that show the same.
    """

    prompt: tuple[int, ...]
    number: int
    longest: int
    shown: Shown | None = None


class Asked(NamedTuple):
    """What is prefilled once: a prompt and, by a number, its pictures."""

    prompt: tuple[int, ...]
    shown: int


class Settings(NamedTuple):
    """How requests are answered. `ends(ids)` says for an answer's ids whether its text has reached a stop: how many ids
    that took, and how many of these come before the stop; None: not yet.
    """

    sampling: Sampling
    stop_ids: Collection[int]
    seed: int
    slots: int
    block: int
    ends: Callable[[Sequence[int]], tuple[int, int] | None] | None = None


@dataclass
class Answer:
    """What there is of an answer: ids with the stop token, log-probabilities as in `models.sampling.Drawn`, how many
    ids come before the stop, and "stop" or "length" when it has ended.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    warped: list[float] = field(default_factory=list)
    kept: int = 0
    finish: str = ""


def answer_requests(
    params: Params, config: DecoderConfig, requests: Sequence[Request], *, settings: Settings, compute: Compute
) -> Iterator[tuple[int, Answer]]:
    """(index of a request, its answer so far) each time that an answer has grown; ValueError for an empty prompt or
    answer, or numbers out of their range.
    """
    _check(requests, settings)
    return _Engine(params, config, requests, settings, compute).run()


def _check(requests: Sequence[Request], settings: Settings) -> None:
    check_sampling(settings.sampling)
    if not requests or not all(request.prompt for request in requests):
        raise ValueError("generate needs at least one prompt, and at least one token in each")
    if min(request.longest for request in requests) < 1:
        raise ValueError("generate: max_new_tokens must be at least 1")
    if settings.slots < 1 or settings.block < 1:
        raise ValueError(f"generate: slots ({settings.slots}) and block ({settings.block}) must be at least 1")


class _Engine:
    """The host's side: who waits, who has which slot, and which programs run next."""

    def __init__(
        self,
        params: Params,
        config: DecoderConfig,
        requests: Sequence[Request],
        settings: Settings,
        compute: Compute,
    ):
        self.params, self.config, self.compute = params, config, compute
        self.requests, self.settings = requests, settings
        self.mesh = _mesh_of(params)
        self.slots = min(settings.slots, len(requests))
        if self.mesh is not None:
            self.slots += -self.slots % replicas(self.mesh)
        self.key = jax.random.key(settings.seed)
        stop_ids = sorted(settings.stop_ids)
        self.stop_ids_K = np.array(stop_ids + [NONE] * (-len(stop_ids) % STOPS or STOPS * (not stop_ids)), np.int32)
        self.answers = [Answer() for _ in requests]
        self.waiting = deque(range(len(requests)))
        self.pictures = {id(request.shown): request.shown for request in requests}
        numbers = {one: number for number, one in enumerate(self.pictures)}
        self.asked = [Asked(request.prompt, numbers[id(request.shown)]) for request in requests]
        self.wanted = Counter(self.asked)  # by those that wait
        self.shelf: dict[Asked, tuple[Prefilled, int]] = {}  # prompts that are prefilled, and wanted
        self.owner: dict[int, int] = {}  # slot → request
        self.most = max(places_of(len(r.prompt) + r.longest, len(r.prompt)) for r in requests)
        self.looks = most_looked_at([one for one in self.pictures.values() if one is not None], config.vision)
        self.rows: Rows | None = None
        with self._on_mesh():
            self.decoding, self.decoding_config = for_decoding(
                params, config=config, compute=compute, apart=jax.default_backend() == "cpu"
            )

    def run(self) -> Iterator[tuple[int, Answer]]:
        while self.waiting or self.owner:
            while taken := self._take():
                yield from self._fill(taken)
            if self.owner:
                yield from self._decode()

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _take(self) -> dict[int, int]:
        """Free slots and the requests that get them."""
        free = [slot for slot in range(self.slots) if slot not in self.owner]
        taken = {slot: self.waiting.popleft() for slot in free[: len(self.waiting)]}
        self.owner |= taken
        return taken

    def _fill(self, taken: dict[int, int]) -> Iterator[tuple[int, Answer]]:
        """Put requests into slots and draw the first token of each."""
        self._prefill({self.asked[index] for index in taken.values()})
        self._grow(taken)
        assert self.rows is not None
        for batch in {id(batch): batch for batch, _ in self.shelf.values()}.values():
            mine = {s: i for s, i in taken.items() if self.shelf[self.asked[i]][0] is batch}
            if not mine:
                continue
            with self._on_mesh():
                placement = self._placement(mine)
                self.rows, drawn = slots.place(
                    self.rows, batch, placement, self.key, self.stop_ids_K, sampling=self.settings.sampling
                )
            first = _host(drawn)
            for column, slot in enumerate(mine):
                yield self._add(slot, first, np.s_[column : column + 1])
        self.wanted -= Counter(self.asked[index] for index in taken.values())
        self.shelf = {asked: place for asked, place in self.shelf.items() if self.wanted[asked]}

    def _prefill(self, asked: Collection[Asked]) -> None:
        """Prompts that are not on the shelf yet, those of like lengths together; where they are few, with those that
        come next, since few are computed no faster than some.
        """
        missing = set(asked) - set(self.shelf)
        for index in self.waiting if missing else ():
            if len(missing) >= AHEAD:
                break
            missing |= {self.asked[index]} - set(self.shelf)
        shown = list(self.pictures.values())
        alike: dict[tuple[int, bool], list[Asked]] = {}
        for one in sorted(missing):
            alike.setdefault((_bucket(len(one.prompt)), shown[one.shown] is None), []).append(one)
        for (length, _), every in alike.items():
            for some in _powers_of_two(every):
                tokens_UL = np.full((len(some), length), NONE, np.int32)
                for row, one in enumerate(some):
                    tokens_UL[row, : len(one.prompt)] = one.prompt
                with self._on_mesh():
                    batch = slots.prefill(
                        self.params,
                        tokens_UL,
                        stacked([shown[one.shown] for one in some], self.config.vision, length=length),
                        config=self.config,
                        compute=self.compute,
                        sampling=self.settings.sampling,
                    )
                self.shelf |= {one: (batch, row) for row, one in enumerate(some)}

    def _placement(self, mine: dict[int, int]) -> Placement:
        """Where these requests go; more than one are padded to all slots, so that two shapes are compiled."""
        rows = [
            (self.shelf[self.asked[index]][1], slot, (request := self.requests[index]).number, request.longest)
            for slot, index in mine.items()
        ]
        rows += [(0, self.slots, 0, 0)] * (self.slots - len(rows) if len(rows) > 1 else 0)
        return Placement(*np.array(rows, np.int32).T)

    def _grow(self, taken: dict[int, int]) -> None:
        """As many places as the next block needs, and prompts that are new; the cache begins small."""
        block, needs = self.settings.block, []
        for index in self.owner.values():
            request, answer = self.requests[index], self.answers[index]
            needs.append(len(request.prompt) + min(len(answer.ids) + block, request.longest))
        needs += [_bucket(len(self.requests[index].prompt)) for index in taken.values()]
        places = min(max(_places_for(max(needs)), max(needs)), self.most)
        with self._on_mesh():
            if self.rows is None:
                self.rows = slots.empty_rows(
                    config=self.config,
                    slots=self.slots,
                    places=places,
                    dtype=self.compute.dtype,
                    apart=isinstance(self.decoding["layers"], list),
                    penalises=self.settings.sampling.penalises,
                    looks=self.looks,
                )
            elif places > jax.tree.leaves(self.rows.cache)[0].shape[3]:
                self.rows = self.rows._replace(cache=slots.grown(self.rows.cache, places=places))

    def _decode(self) -> Iterator[tuple[int, Answer]]:
        """A block of steps for all slots."""
        self._grow({})
        assert self.rows is not None
        with self._on_mesh():
            self.rows, drawn = slots.decode(
                self.decoding,
                self.rows,
                np.array([slot in self.owner for slot in range(self.slots)]),
                self.key,
                self.stop_ids_K,
                config=self.decoding_config,
                compute=self.compute,
                sampling=self.settings.sampling,
                steps=self.settings.block,
                until_free=bool(self.waiting) and jax.default_backend() == "cpu",
            )
        block = _host(drawn)
        for slot in list(self.owner):
            steps = int((block.token_B[:, slot] != NONE).sum())
            if steps:
                yield self._add(slot, block, np.s_[:steps, slot])

    def _add(self, slot: int, drawn: Drawn, at: Any) -> tuple[int, Answer]:
        """What was drawn in a slot joins its request's answer; one that has ended gives the slot back."""
        index = self.owner[slot]
        answer, request = self.answers[index], self.requests[index]
        answer.ids += drawn.token_B[at].tolist()
        answer.logprobs += drawn.logprob_B[at].tolist()
        answer.warped += [] if drawn.warped_B is None else drawn.warped_B[at].tolist()
        answer.kept = len(answer.ids)
        if answer.ids[-1] in self.settings.stop_ids:
            answer.kept, answer.finish = len(answer.ids) - 1, "stop"
        elif len(answer.ids) >= request.longest:
            answer.finish = "length"
        if self.settings.ends is not None and (end := self.settings.ends(answer.ids[: answer.kept])):
            length, answer.kept, answer.finish = *end, "stop"
            del answer.ids[length:], answer.logprobs[length:], answer.warped[length:]
        if answer.finish:
            del self.owner[slot]
        return index, answer


def _powers_of_two(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Items in parts of 2^k, the largest first: few shapes to compile, and no row for nothing."""
    while items:
        size = 1 << (len(items).bit_length() - 1)
        yield items[:size]
        items = items[size:]


def _bucket(length: int) -> int:
    """A length to pad to: steps of a quarter at most, and of BUCKET at least."""
    step = max(BUCKET, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def places_of(whole: int, prompt: int) -> int:
    """The most places that a request needs."""
    return max(_bucket(prompt), -(-whole // BUCKET) * BUCKET)


def _places_for(need: int) -> int:
    return max(FEWEST_PLACES, 1 << (need - 1).bit_length())


def _mesh_of(params: Params) -> Any:
    sharding = params["embed"]["embedding"].sharding
    return sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None


def _host(drawn: Drawn) -> Any:
    return jax.tree.map(np.asarray, drawn)
