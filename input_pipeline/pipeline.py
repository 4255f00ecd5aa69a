"""From the data section of a configuration to batches: rows → examples → tokens → packed or padded rows → [A, B, L]."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from input_pipeline.batches import Batch, Batches
from input_pipeline.collate import Line, bucket_length, collate, line_of, shift
from input_pipeline.order import EpochOrder, permutation
from input_pipeline.packing import Packed, plan
from input_pipeline.reading import Data, Reading, read_data
from input_pipeline.store import TokenStore


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Batches, and what is known beforehand about them."""

    batches: Batches
    steps: int | None  # optimizer steps until the epochs are used up; None: without end
    steps_per_epoch: int
    data: Data  # the rows they are made of
    longest: int  # the largest L that a batch has
    longest_document: int  # the most tokens that see one another in a row
    useful: float  # share of the first epoch's places that hold a token, the rest is padding


def train_feed(
    data: Mapping[str, Any],
    tokenizer: Any,
    *,
    reading: Reading,
    rows_per_step: int,
    accumulation: int,
    epochs: float | None,
    shuffle_rows: bool = True,
    drop_last: bool = False,
    prefetch: int = 2,
) -> Feed:
    """Batches [A, B, L] of `data.train` for all processes, A = `accumulation`, A * B = `rows_per_step`.

    Every epoch holds each row once, in an order drawn from (`reading.seed`, epoch), or as stored without
    `shuffle_rows`. `epochs` may be a fraction; None goes on for ever. `drop_last` leaves out an epoch's last microbatch
    if it is not full. `prefetch`: batches made ready ahead, in a thread.
    """
    split = data["train"]
    return _feed(
        read_data(split, tokenizer, reading=reading, what="train"),
        packed=bool(split.get("pack")),
        rows_per_step=rows_per_step,
        accumulation=accumulation,
        epochs=epochs,
        seed=reading.seed if shuffle_rows else None,
        drop_last=drop_last,
        prefetch=prefetch,
    )


def eval_feed(
    data: Mapping[str, Any], tokenizer: Any, *, reading: Reading, rows_per_step: int, prefetch: int = 0
) -> Feed:
    """Batches [1, B, L] of `data.validation`, once through, in the order stored; what is trained is settled as for
    `data.train`.

    For another pass, `set_state` to the state before the first batch.
    """
    split = dict(data["validation"])
    for key in ("collator_name", "train_target"):
        split[key] = split.get(key) or data["train"].get(key)
    split["collator_kwargs"] = split.get("collator_kwargs") or data["train"].get("collator_kwargs")
    return _feed(
        read_data(split, tokenizer, reading=reading, what="validation"),
        packed=bool(split.get("pack")),
        rows_per_step=rows_per_step,
        accumulation=1,
        epochs=1,
        seed=None,
        drop_last=False,
        prefetch=prefetch,
    )


def _feed(
    data: Data,
    *,
    packed: bool,
    rows_per_step: int,
    accumulation: int,
    epochs: float | None,
    seed: int | None,
    drop_last: bool,
    prefetch: int,
) -> Feed:
    if rows_per_step % accumulation:
        raise ValueError(
            f"{rows_per_step} rows a step cannot be split into {accumulation} microbatches of the same size"
        )
    microbatch = rows_per_step // accumulation
    lengths = data.store.lengths
    lines: grain.MapDataset = grain.MapDataset.source(_Documents(data.store))
    if packed:
        lines = Packed(lines, lengths=lengths, plan=plan(lengths, data.max_length), seed=seed)
    keep = len(lines) // microbatch * microbatch if drop_last else len(lines)
    if not keep:
        raise ValueError(f"dataloader_drop_last leaves nothing of {len(lines)} rows: a microbatch has {microbatch}")
    lines = EpochOrder(lines, seed=seed, keep=keep)
    stack = _Stack(accumulation, microbatch, data.max_length, fixed=packed)
    steps_of_epoch = lines.batch(rows_per_step, batch_fn=list).map(stack)
    steps = None if epochs is None else math.ceil(epochs * len(steps_of_epoch))
    every_step = steps_of_epoch.repeat(None if epochs is None else math.ceil(epochs))[:steps]
    batches = every_step.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if prefetch:
        batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)
    fingerprint = {
        "tokens": data.store.fingerprint(),
        "rows_per_step": rows_per_step,
        "rows_per_epoch": keep,
        "pack": packed,
        "row_length": data.max_length,
        "seed": seed,
    }
    longest, useful = _usage(lengths, keep, stack, rows_per_step, seed)
    return Feed(
        batches=Batches(batches, fingerprint=fingerprint, name_of=data.name_of),
        steps=steps,
        steps_per_epoch=len(steps_of_epoch),
        data=data,
        longest=longest,
        longest_document=int(lengths.max()),
        useful=useful,
    )


def _usage(lengths: np.ndarray, keep: int, stack: "_Stack", rows_per_step: int, seed: int | None) -> tuple[int, float]:
    """The longest row that any epoch can have, and which share of the first epoch's batches is tokens."""
    steps = math.ceil(keep / rows_per_step)
    if stack.fixed:
        return stack.max_length, float(lengths.sum() / (steps * rows_per_step * stack.max_length))
    order = lengths[permutation(len(lengths), seed, 0)][:keep]
    maxima = np.maximum.reduceat(order, np.arange(0, keep, rows_per_step))
    places = sum(bucket_length(int(longest), stack.max_length) for longest in maxima) * rows_per_step
    return bucket_length(int(lengths.max()), stack.max_length), float(order.sum() / places)


@dataclass(frozen=True)
class _Documents:
    """The rows of a store as lines of one document each."""

    store: TokenStore

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Line:
        return line_of(shift(*self.store[index]), int(index))


@dataclass(frozen=True)
class _Stack:
    """Stacks the lines of a step: to `max_length` if `fixed`, else to the smallest bucket that holds the longest of
    them."""

    accumulation: int
    rows: int
    max_length: int
    fixed: bool

    def __call__(self, lines: list[Line]) -> tuple[Batch, tuple[int, ...]]:
        longest = max(len(line.columns) for line in lines)
        length = self.max_length if self.fixed else bucket_length(longest, self.max_length)
        batch = collate(lines, accumulation=self.accumulation, rows=self.rows, length=length)
        return batch, tuple(row for line in lines for row in line.rows)
