"""Batches of the policy's own answers: prompts → answers → rewards → advantages → arrays to train on.

N answers, G to each prompt, next to one another; F reward functions; batches [A, B, L] as everywhere. Every process
does the same, but that rewards are asked for on process 0 alone.
"""

import base64
import dataclasses
import io
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from input_pipeline.batches import State, same_data
from input_pipeline.collate import Line, bucket_length, collate
from input_pipeline.pairs import Answer, answers_line
from input_pipeline.picture_rows import picture_arrays
from input_pipeline.processors.processor import Processor
from input_pipeline.prompts import PromptBatches, PromptRow, Prompts
from models.generate import Generated
from trainers.advantages import Valued
from trainers.kl_reward import KlPenalty
from trainers.processes import on_process_0
from trainers.step import TrainState

log = logging.getLogger(__name__)

HostBatch = dict[str, np.ndarray]
Rewards = np.ndarray  # float64 [N, F], NaN where a function has no opinion


class Judge(Protocol):
    """What scores answers, such as `reward_workers.RewardFunctions`; `failures` counts scores that failed so far."""

    failures: int

    @property
    def names(self) -> tuple[str, ...]: ...

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Rewards: ...


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How answers become batches: `group` answers to each prompt, `together` of them in a row of at most `max_length`
    tokens, behind their prompt, and `rows` of these in a microbatch; a generation is learned from in `updates`
    optimizer steps of `accumulation` microbatches each, round and round. With `mask_truncated`, answers that were cut
    off teach nothing. `seed` is of the order in which rows are learned from, where there is more than one update.
    """

    group: int
    together: int
    rows: int
    accumulation: int
    updates: int
    max_length: int
    mask_truncated: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class Means:
    """What a rollout is made with.

    sample(state, frozen, prompts, generation, group): `group` answers to each, in order. judge: rewards.
    value(rewards, lengths, group, penalties): advantages. penalty: what rewards lose in training. score(state, frozen,
    batch): log-probabilities of the targets [M, B, L] under the policy that answered, as training computes them; None
    where there is but one update. decode(ids): text. attempts: how often more prompts are drawn for groups that tell
    nothing; 1: never. processor: what the prompts' pictures were prepared by, if they have any.
    """

    sample: Callable[[TrainState, Any, Sequence[PromptRow], int, int], list[Generated]]
    judge: Judge
    value: Callable[[Rewards, np.ndarray, int, np.ndarray | None], Valued]
    decode: Callable[[Sequence[int]], str]
    score: Callable[[TrainState, Any, HostBatch], np.ndarray] | None = None
    penalty: KlPenalty | None = None
    attempts: int = 1
    processor: Processor | None = None


class Answered(NamedTuple):
    """A prompt's answers, what they were given and what they are worth."""

    row: PromptRow
    answers: tuple[Generated, ...]
    texts: tuple[str, ...]
    rewards: Rewards  # [G, F]
    advantages: np.ndarray  # [G]


class Rollouts:
    """Batches to train on, one after the other; the policy answers anew when the last ones are used up.

    `sampled(state)` is the next batch, by the policy of `state`. `get_state()` has what is left of a generation, so
    that a run goes on bit for bit in the midst of one.
    """

    part = None  # every process is given the whole batch

    def __init__(self, prompts: PromptBatches, means: Means, shape: Shape):
        self._prompts, self._means, self._shape = prompts, means, shape
        self.on_answers: OnAnswers | None = None
        self._generation = 0
        self._answers: HostBatch = {}  # of the generation, [M, B, L]
        self._rows_of: list[list[int]] = []  # of each of its M microbatches
        self._next = shape.updates  # which of its updates comes next
        self.rows: tuple[int, ...] = ()
        self._logged: dict[str, float] = {}
        self._given: float | None = None

    @property
    def reward_names(self) -> tuple[str, ...]:
        """The reward functions' names."""
        return self._means.judge.names

    def sampled(self, state: TrainState, frozen: Any) -> HostBatch:
        """The next batch [A, B, L]; `state` holds the policy, or what is trained of it beside `frozen`."""
        if self._next == self._shape.updates:
            self._generate(state, frozen)
        first = self._next * self._shape.accumulation
        taken = [m % len(self._rows_of) for m in range(first, first + self._shape.accumulation)]
        self._next += 1
        self.rows = tuple(row for m in taken for row in self._rows_of[m])
        self._given = time.perf_counter()
        return {name: array[taken] for name, array in self._answers.items()}

    def judged(self, state: TrainState, frozen: Any, prompts: Prompts, *, group: int) -> dict[str, float]:
        """What the policy's answers to other prompts are worth, `group` to each: the log's numbers of them all."""
        rows = [prompts[row] for row in range(len(prompts))]
        answers = self._means.sample(state, frozen, rows, -1, group)
        groups, valued = self._judged(rows, answers, group)
        return valued.logged | completion_metrics(groups)

    def logged(self) -> dict[str, float]:
        """What there is to log of the generation that the last batch began; nothing if it began none."""
        found, self._logged = self._logged, {}
        return found

    def name_of(self, row: int) -> str:
        """Where a prompt comes from."""
        return self._prompts.name_of(row)

    def get_state(self) -> State:
        """Where the next batch starts, with the answers that are not used up."""
        left = self._next < self._shape.updates
        return {
            "data": self._data(),
            "position": {
                "prompts": self._prompts.get_state()["position"],
                "generation": self._generation,
                "next": self._next,
                "answers": _packed(self._answers) if left else None,
                "rows": self._rows_of if left else [],
                "kl_coefficient": self._means.penalty and self._means.penalty.coefficient,
            },
        }

    def set_state(self, state: State) -> None:
        """Go on where `state` was taken; ValueError says what differs if it is of other data."""
        same_data(state["data"], self._data())
        position = state["position"]
        self._prompts.set_state({"data": self._prompts.get_state()["data"], "position": position["prompts"]})
        self._generation, self._next = int(position["generation"]), int(position["next"])
        self._answers = _unpacked(position["answers"]) if position["answers"] else {}
        self._rows_of = [list(map(int, rows)) for rows in position["rows"]]
        if self._means.penalty is not None:
            self._means.penalty.coefficient = float(position["kl_coefficient"])

    def close(self) -> None:
        """Nothing runs ahead."""

    def _data(self) -> dict[str, Any]:
        shape = self._shape
        answers = shape.rows * shape.together * shape.accumulation
        own = {"rows_per_step": answers, **dataclasses.asdict(shape)}
        return {**self._prompts.get_state()["data"], **own}

    def _generate(self, state: TrainState, frozen: Any) -> None:
        clock = _Clock(self._given)
        jax.block_until_ready(state.params)
        clock.lap("update")
        failures = self._means.judge.failures
        groups, logged = self._answered(state, frozen, clock)
        lines = self._lines(groups, mask_truncated=self._shape.mask_truncated)
        if self._shape.updates > 1:
            order = np.random.default_rng([self._shape.seed, self._generation]).permutation(len(lines))
            lines = [lines[i] for i in order]
        self._answers, self._rows_of = self._batched(lines, groups)
        self._next = 0
        if self._means.score is not None:
            self._answers["old_logprobs"] = self._means.score(state, frozen, self._answers)
            clock.lap("score")
        self._logged = logged | completion_metrics(groups) | clock.seconds(groups)
        self._logged["reward_failures"] = float(self._means.judge.failures - failures)
        if self.on_answers is not None:
            self.on_answers(int(state.step), groups)

    def _answered(self, state: TrainState, frozen: Any, clock: "_Clock") -> tuple[list[Answered], dict[str, float]]:
        """Groups of answers, as many as a generation has; for those that tell nothing others are drawn, if asked."""
        kept: list[Answered] = []
        spare: list[Answered] = []
        logged: list[dict[str, float]] = []
        for attempt in range(1, self._means.attempts + 1):
            rows = next(self._prompts)
            answers = self._means.sample(state, frozen, rows, self._generation, self._shape.group)
            self._generation += 1
            clock.lap("generate")
            groups, valued = self._judged(rows, answers, self._shape.group, policy=(state, frozen))
            clock.lap("reward")
            logged.append(valued.logged)
            for group, tells in zip(groups, valued.informative, strict=True):
                (kept if tells or self._means.attempts == 1 else spare).append(group)
            if len(kept) >= len(rows):
                break
            if attempt == self._means.attempts and spare:
                log.warning(
                    "after %d tries %d of %d prompts have answers that differ in reward", attempt, len(kept), len(rows)
                )
        means = {name: _mean([each[name] for each in logged]) for name in logged[0]}
        return (kept + spare)[: len(rows)], means

    def _judged(
        self,
        rows: Sequence[PromptRow],
        answers: Sequence[Generated],
        group: int,
        *,
        policy: tuple[TrainState, Any] | None = None,
    ) -> tuple[list[Answered], Valued]:
        """Groups and what they are worth; rewards of a `policy` that learns lose what the penalty takes."""
        texts = [self._means.decode(answer.tokens) for answer in answers]
        each = [row for row in rows for _ in range(group)]
        names = sorted(set().union(*(row.columns for row in rows)))
        scores = on_process_0(
            lambda: self._means.judge.score(
                [row.prompt for row in each],
                [completion_of(row, text) for row, text in zip(each, texts, strict=True)],
                [answer.ids for answer in answers],
                {name: [row.columns.get(name) for row in each] for name in names},
            ).tolist()
        )
        rewards = np.array(scores, np.float64)
        groups = []  # not worth anything yet
        for number, row in enumerate(rows):
            own = slice(number * group, (number + 1) * group)
            groups.append(Answered(row, tuple(answers[own]), tuple(texts[own]), rewards[own], np.zeros(group)))
        penalties, logged = None, dict[str, float]()
        if policy is not None and self._means.penalty is not None:
            batch, _ = self._batched(self._lines(groups, mask_truncated=False), groups)
            penalties, logged = self._means.penalty(*policy, batch)
        lengths = np.array([len(answer.ids) for answer in answers])
        valued = self._means.value(rewards, lengths, group, penalties)
        worth = valued.advantages.reshape(-1, group)
        groups = [one._replace(advantages=own) for one, own in zip(groups, worth, strict=True)]
        return groups, valued._replace(logged=valued.logged | logged)

    def _lines(self, groups: Sequence[Answered], *, mask_truncated: bool) -> list[Line]:
        together = self._shape.together
        return [line for one in groups for line in lines_of(one, mask_truncated=mask_truncated, together=together)]

    def _batched(self, lines: list[Line], groups: Sequence[Answered]) -> tuple[HostBatch, list[list[int]]]:
        """The rows [M, B, L] of these groups' answers, and which prompts each microbatch has."""
        shape, processor = self._shape, self._means.processor
        length = bucket_length(max(len(line.columns) for line in lines), shape.max_length)
        count, left = divmod(len(lines), shape.rows)
        assert not left
        rows = [[int(line.rows[0]) for line in lines[m * shape.rows : (m + 1) * shape.rows]] for m in range(count)]
        batch = collate(lines, accumulation=count, rows=shape.rows, length=length)
        if processor is not None:
            shown = {group.row.row: group.row.pictures or processor.nothing() for group in groups}
            prepared = [[shown[line.rows[0]]] for line in lines]
            batch |= picture_arrays(lines, prepared, processor, accumulation=count, rows=shape.rows, length=length)
        return batch, rows


OnAnswers = Callable[[int, Sequence[Answered]], None]  # told of every generation, with the updates made before it


def completion_of(row: PromptRow, text: str) -> Any:
    """An answer as reward functions see it: a string after a string, a message after messages (as TRL has it)."""
    return text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]


def lines_of(group: Answered, *, mask_truncated: bool, together: int = 1) -> list[Line]:
    """Rows of a batch, with `advantages` and `sampled_logprobs` at the predictions of answers: for each answer its
    prompt, then itself; or, `together`, the prompt once and so many answers as branches (`input_pipeline/pairs.py`).
    An answer that was cut off has no weight if it is to be masked, and stands there all the same.
    """
    prompt = np.array(group.row.ids, np.int32)
    lines = []
    for first in range(0, len(group.answers), together):
        some = slice(first, first + together)
        answers = [Answer(np.array(each.ids, np.int32), n) for n, each in enumerate(group.answers[some], start=1)]
        line = answers_line(prompt, answers, row=group.row.row, shared=together > 1)
        lengths, predictions = [len(answer.ids) for answer in answers], line.columns[:, 2] > 0
        more = {name: np.zeros(len(line.columns), np.float32) for name in ("advantages", "sampled_logprobs")}
        more["advantages"][predictions] = np.repeat(group.advantages[some], lengths)
        more["sampled_logprobs"][predictions] = np.concatenate([each.logprobs for each in group.answers[some]])
        learned = [not mask_truncated or each.finish == "stop" for each in group.answers[some]]
        line.columns[predictions, 2] = np.repeat(learned, lengths)
        lines.append(line._replace(more=more | ({"branches": line.more["branches"]} if together > 1 else {})))
    return lines


def completion_metrics(groups: Sequence[Answered]) -> dict[str, float]:
    """Lengths of the answers in tokens, and the share that was cut off, under TRL's names."""
    answers = [answer for group in groups for answer in group.answers]
    lengths = {"": [len(answer.ids) for answer in answers]}
    lengths["terminated_"] = [len(answer.ids) for answer in answers if answer.finish == "stop"]
    found = {
        f"completions/{name}_{kind}length": float(of(each))
        for kind, each in lengths.items()
        for name, of in (("mean", np.mean), ("min", np.min), ("max", np.max))
        if each
    }
    return found | {"completions/clipped_ratio": 1 - len(lengths["terminated_"]) / len(answers)}


def _mean(values: Sequence[float]) -> float:
    """The mean of those that are numbers; NaN where none is."""
    numbers = [value for value in values if not np.isnan(value)]
    return float(np.mean(numbers)) if numbers else float("nan")


class _Clock:
    """Seconds of each phase since the last batch was handed over."""

    def __init__(self, since: float | None):
        self._last = time.perf_counter() if since is None else since
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """The phase ends now; it may come again."""
        now = time.perf_counter()
        self._laps[phase] = self._laps.get(phase, 0.0) + now - self._last
        self._last = now

    def seconds(self, groups: Sequence[Answered]) -> dict[str, float]:
        """`time/<phase>`, and the tokens of the answers by the seconds they took."""
        tokens = sum(len(answer.ids) for group in groups for answer in group.answers)
        found = {f"time/{phase}": seconds for phase, seconds in self._laps.items()}
        return found | {"generated_tokens_per_second": tokens / max(self._laps["generate"], 1e-9)}


def _packed(batch: HostBatch) -> str:
    """A batch as text: numpy's own format, without pickle, in base64."""
    file = io.BytesIO()
    np.savez_compressed(file, **batch)  # type: ignore[arg-type]  # names are no arguments of its
    return base64.b64encode(file.getvalue()).decode("ascii")


def _unpacked(text: str) -> HostBatch:
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
