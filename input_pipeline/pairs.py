"""A prompt with its answers as one line of a batch: the documents of a store that `answers.py` made.

A line has `branches` beside the usual columns: 1 and 2 for a wanted and an unwanted answer, 3 for another row's answer
to this row's prompt. The prompt stands once, as branch 0, but for its last token, which begins every branch, since it
predicts each answer's first token:

    tokens     p0 p1 p2 a0 a1 p2 b0           or, `shared=False`,  p0 p1 p2 a0 a1 p0 p1 p2 b0
    branches    0  0  1  1  1  2  2                                 1  1  1  1  1  2  2  2  2
    positions   0  1  2  3  4  2  3                                 0  1  2  3  4  0  1  2  3
    targets    p1 p2 a0 a1  . b0  .                                p1 p2 a0 a1  . p1 p2 b0  .
    weights     0  0  1  1  0  1  0                                 0  0  1  1  0  0  0  1  0

With reference log-probabilities, known beforehand, `reference` holds each at its answer's first prediction, else 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from input_pipeline.collate import Line
from input_pipeline.store import TokenStore

OTHERS = 3  # the branch of another row's answer


class Answer(NamedTuple):
    """An answer's token ids int32 [n], and its branch."""

    ids: np.ndarray
    branch: int


class Laid(NamedTuple):
    """How prompts and answers are laid out: the prompt once (`shared`) or before each answer; for each row the one
    whose answer is set beside its own, int64 [R]; the reference's log-probability of each row's answers, in their
    order, float32 [R, answers].
    """

    shared: bool
    partners: np.ndarray | None = None
    reference: np.ndarray | None = None


@dataclass(frozen=True)
class Answered:
    """The rows of a store as lines; an answer is cut to `max_length` tokens with the prompt before it."""

    store: TokenStore
    laid: Laid
    max_length: int | None

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Line:
        prompt, answers = sides(*self.store[index])
        if self.laid.partners is not None:
            _, (other,) = sides(*self.store[int(self.laid.partners[index])])
            answers = [*answers, other._replace(branch=OTHERS)]
        answers = [answer._replace(ids=answer.ids[: self._room(len(prompt))]) for answer in answers]
        reference = None if self.laid.reference is None else self.laid.reference[index]
        return answers_line(prompt, answers, row=int(index), shared=self.laid.shared, reference=reference)

    def lengths(self) -> np.ndarray:
        """Tokens of each line, int64 [R]."""
        prompts, answers = self._prompts_and_answers()
        if self.laid.shared:
            return prompts - 1 + sum(1 + n for n in answers)
        return sum(prompts + n for n in answers)

    def longest_document(self) -> int:
        """The most places of a line that lie between two tokens of which one sees the other, and one more."""
        if self.laid.shared:
            return int(self.lengths().max())
        prompts, answers = self._prompts_and_answers()
        return int(max((prompts + n).max() for n in answers))

    def _room(self, prompt: Any) -> Any:
        """How many tokens an answer may have after a prompt of so many."""
        return (2**31 if self.max_length is None else self.max_length) - prompt

    def _prompts_and_answers(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Tokens of each line's prompt, and of each of its answers."""
        offsets = np.asarray(self.store.offsets)
        marks = np.asarray(self.store.trained)
        begins = np.flatnonzero(np.diff(marks.astype(np.int8), prepend=np.int8(0)) > 0)  # 0 → 1 or 2: an answer
        ends = np.flatnonzero(np.diff((marks > 0).astype(np.int8), append=np.int8(0)) < 0) + 1
        each = (len(begins) // len(self)) if len(self) else 1  # every row has as many answers
        prompts = begins[::each] - offsets[:-1]
        lengths = (ends - begins).reshape(-1, each)
        answers = [lengths[:, i] for i in range(each)]
        if self.laid.partners is not None:
            answers.append(answers[0][self.laid.partners])
        return prompts, [np.minimum(n, self._room(prompts)) for n in answers]


def sides(ids: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, list[Answer]]:
    """A row of the store as its prompt's ids and its answers; see `answers.encode_answers`."""
    marked = np.concatenate([[0], marks > 0, [0]]).astype(np.int8)
    begins, ends = np.flatnonzero(np.diff(marked) == 1), np.flatnonzero(np.diff(marked) == -1)
    answers = [Answer(ids[b:e], int(marks[b])) for b, e in zip(begins, ends, strict=True)]
    return ids[: begins[0]], answers


def answers_line(
    prompt: np.ndarray, answers: Sequence[Answer], *, row: int, shared: bool, reference: np.ndarray | None = None
) -> Line:
    """The line of a prompt with its answers; `reference` has a log-probability for each of these."""
    kept = len(prompt) - 1 if shared else 0  # tokens of the prompt that stand once
    parts = [_part(prompt, kept, branch=0, start=0, answer=0)] if kept else []
    for answer in answers:
        ids = np.concatenate([prompt[kept:], answer.ids])
        parts.append(_part(ids, len(ids), branch=answer.branch, start=kept, answer=len(answer.ids)))
    columns, positions, branches = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    more = {"branches": branches}
    if reference is not None:
        weighted = columns[:, 2] > 0
        first = np.flatnonzero(weighted & ~np.concatenate([[False], weighted[:-1]]))
        more["reference"] = np.zeros(len(columns), np.float32)
        more["reference"][first] = reference
    return Line(columns, np.ones(len(columns), np.int32), positions, (row,), more)


def _part(ids: np.ndarray, count: int, *, branch: int, start: int, answer: int) -> tuple[np.ndarray, ...]:
    """Columns, positions and branches of the first `count` of these tokens; the last `answer` tokens are predicted."""
    columns = np.zeros((count, 3), np.int32)
    columns[:, 0] = ids[:count]
    targets = ids[1 : count + 1]
    columns[: len(targets), 1] = targets
    if answer:
        columns[len(ids) - answer - 1 : len(ids) - 1, 2] = 1
    return columns, np.arange(start, start + count, dtype=np.int32), np.full(count, branch, np.int32)
