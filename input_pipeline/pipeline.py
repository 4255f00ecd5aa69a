"""From the data section of a configuration to batches: rows → examples → tokens → packed or padded rows → [A, B, L]."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np

from input_pipeline.batches import Batch, Batches, Part
from input_pipeline.catalog import Entry
from input_pipeline.collate import Line, bucket_length, collate, line_of, shift
from input_pipeline.lanes import Recipe
from input_pipeline.order import EpochOrder, permutation
from input_pipeline.packing import Packed, Wrapped, cut, plan
from input_pipeline.pairs import Answered, Laid
from input_pipeline.picture_rows import RowPictures, arrays_of
from input_pipeline.prompts import Prompts
from input_pipeline.reading import Data, Reading, Streams, packing_of, read_data, read_streams
from input_pipeline.store import Counts, TokenStore
from input_pipeline.stream import StreamBatches, lanes_for

LayOut = Callable[[Data, int], Laid]  # how rows that are answers are laid out, so many of them in a microbatch
_SMALLEST_BLOCK = {None: 16, "wrapped": 16, "bfd": 256, "bfd_split": 256}  # rows; best fit needs a choice


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Batches, and what is known beforehand about them."""

    batches: Any  # Batches, StreamBatches, or what a policy makes of its own answers
    steps: int | None  # optimizer steps until the epochs are used up; None: without end
    steps_per_epoch: int | None  # None: of a stream, it is not known
    data: Data | Prompts | None  # the rows they are made of; None: they are not read yet
    longest: int  # the largest L that a batch has
    longest_document: int  # the most tokens that see one another in a row
    useful: float | None  # share of the first epoch's places that hold a token, the rest is padding
    notices: tuple[str, ...]  # for the log
    packed: bool = True  # a row may hold several documents that do not see one another, or answers
    together: int = 1  # answers of the policy's own that a row has, its prompt once before them

    @property
    def counts(self) -> Counts:
        """What became of the rows read so far."""
        return self.batches.found.counts if isinstance(self.batches, StreamBatches) else self._data().counts

    def seen(self) -> dict[str, float]:
        """The share of each dataset in the rows: of a stream those used so far, else those of an epoch."""
        if isinstance(self.batches, StreamBatches):
            names, rows = self.batches.names, [self.batches.seen[n] for n in range(len(self.batches.names))]
        else:
            names = self._data().names
            rows = np.bincount(self._data().store.sources[:, 0], minlength=len(names)).tolist()
        return {name: count / max(sum(rows), 1) for name, count in zip(names, rows, strict=True)}

    def _data(self) -> Data | Prompts:
        assert self.data is not None
        return self.data


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
    part: Part | None = None,
    workers: int = 0,
    lay_out: LayOut | None = None,
) -> Feed:
    """Batches [A, B, L] of `data.train` for all processes, A = `accumulation`, A * B = `rows_per_step`.

    Every epoch holds each row once, in an order drawn from (`reading.seed`, epoch), or as stored without
    `shuffle_rows`. `epochs` may be a fraction; None goes on for ever. `drop_last` leaves out an epoch's last microbatch
    if it is not full. `prefetch`: batches made ready ahead, in a thread. Rows that are answers to a prompt need
    `lay_out`, which is asked once they are read.

    With `data.train.stream` rows are read as they come, `part` says which rows of a microbatch this process is given
    (None: all), and so many `workers` read them. How many steps their epochs have is not known: where `epochs` asks for
    it, rows on disk are all read first, as without `stream`, and others are an error.
    """
    split = data["train"]
    packing = packing_of(split, reading)
    if split.get("stream") and epochs is None:
        return _stream_feed(
            read_streams(split, tokenizer, reading=reading, what="train"),
            split,
            reading=reading,
            rows_per_step=rows_per_step,
            accumulation=accumulation,
            seed=reading.seed if shuffle_rows else None,
            repeat=True,
            prefetch=prefetch,
            part=part if packing else None,
            workers=workers,
        )
    notices = _counted_first(split, reading) if split.get("stream") else ()
    return _feed(
        read_data(split, tokenizer, reading=reading, what="train"),
        packing=packing,
        isolate=split.get("isolate_documents", True),
        rows_per_step=rows_per_step,
        accumulation=accumulation,
        epochs=epochs,
        seed=reading.seed if shuffle_rows else None,
        drop_last=drop_last,
        prefetch=prefetch,
        notices=notices,
        lay_out=lay_out,
    )


def eval_feed(
    data: Mapping[str, Any],
    tokenizer: Any,
    *,
    reading: Reading,
    rows_per_step: int,
    prefetch: int = 0,
    lay_out: LayOut | None = None,
) -> Feed:
    """Batches [1, B, L] of `data.validation`, once through, in the order stored; what is trained is settled as for
    `data.train`.

    For another pass, `set_state` to the state before the first batch.
    """
    split = dict(data["validation"])
    for key in ("collator_name", "train_target"):
        split[key] = split.get(key) or data["train"].get(key)
    split["collator_kwargs"] = split.get("collator_kwargs") or data["train"].get("collator_kwargs")
    if split.get("stream"):
        return _stream_feed(
            read_streams(split, tokenizer, reading=reading, what="validation"),
            split,
            reading=reading,
            rows_per_step=rows_per_step,
            accumulation=1,
            seed=None,
            repeat=False,
            prefetch=prefetch,
        )
    return _feed(
        read_data(split, tokenizer, reading=reading, what="validation"),
        packing=packing_of(split, reading),
        isolate=split.get("isolate_documents", True),
        rows_per_step=rows_per_step,
        accumulation=1,
        epochs=1,
        seed=None,
        drop_last=False,
        prefetch=prefetch,
        lay_out=lay_out,
    )


def once_through(data: Data, lay_out: LayOut, *, rows_per_step: int) -> Feed:
    """Batches [1, B, L] of rows that are answers to a prompt, read already, in the order stored."""
    return _feed(
        data,
        packing=None,
        isolate=True,
        rows_per_step=rows_per_step,
        accumulation=1,
        epochs=1,
        seed=None,
        drop_last=False,
        prefetch=0,
        lay_out=lay_out,
    )


def _counted_first(split: Mapping[str, Any], reading: Reading) -> tuple[str, ...]:
    """A remark that a stream's rows are read before the first step; ValueError where they are not on this machine."""
    for entry in split["datasets"]:
        if not Entry.of(entry).is_local:
            raise ValueError(
                f"data.train.stream: how many rows {entry['dataset_name']} has is not known before they are read, and"
                " the learning rate's schedule needs the number of steps; set training.max_steps"
            )
    return (
        "data.train.stream without training.max_steps: all rows are read and tokenised first, to count the steps; set"
        " training.max_steps to begin at once",
    )


def _stream_feed(
    streams: Streams,
    split: Mapping[str, Any],
    *,
    reading: Reading,
    rows_per_step: int,
    accumulation: int,
    seed: int | None,
    repeat: bool,
    prefetch: int,
    part: Part | None = None,
    workers: int = 0,
) -> Feed:
    length, packing = reading.max_length, packing_of(split, reading)
    if length is None:
        raise ValueError("data.train.stream needs model.model_max_length: the longest row of a stream is not known")
    lanes = lanes_for(rows_per_step, shuffled=seed is not None)
    recipe = Recipe(
        streams=streams.streams,
        encoder=streams.encoder,
        proportions=streams.proportions,
        limits=streams.limits,
        seed=seed,
        mix_seed=streams.mix_seed,
        lanes=lanes,
        block=max(_SMALLEST_BLOCK[packing], -(-streams.shuffle_buffer // lanes)),
        length=length,
        packing=packing,
        isolate=split.get("isolate_documents", True),
        repeat=repeat,
        all_exhausted=streams.all_exhausted,
    )
    microbatch = rows_per_step // accumulation
    fingerprint = {
        "streams": streams.fingerprint(),
        "rows_per_step": rows_per_step,
        "lanes": lanes,
        "block": recipe.block,
        "pack": packing,
        "row_length": length,
        "seed": seed,
    }
    batches = StreamBatches(
        recipe,
        accumulation=accumulation,
        part=part or Part(0, microbatch, microbatch),
        fingerprint=fingerprint,
        workers=workers,
        prefetch=prefetch,
        max_bad_fraction=split.get("max_bad_row_fraction"),
    )
    return Feed(
        batches=batches,
        steps=None,
        steps_per_epoch=None,
        data=None,
        longest=length,
        longest_document=length,
        useful=None,
        notices=streams.notices,
        packed=packing is not None and recipe.isolate,
    )


def _feed(
    data: Data,
    *,
    packing: str | None,
    isolate: bool,
    rows_per_step: int,
    accumulation: int,
    epochs: float | None,
    seed: int | None,
    drop_last: bool,
    prefetch: int,
    notices: tuple[str, ...] = (),
    lay_out: LayOut | None = None,
) -> Feed:
    if rows_per_step % accumulation:
        raise ValueError(
            f"{rows_per_step} rows a step cannot be split into {accumulation} microbatches of the same size"
        )
    microbatch = rows_per_step // accumulation
    made = _answers(data, lay_out, microbatch) if lay_out else _lines(data, packing, seed=seed, isolate=isolate)
    keep = len(made.lines) // microbatch * microbatch if drop_last else len(made.lines)
    if not keep:
        raise ValueError(
            f"dataloader_drop_last leaves nothing of {len(made.lines)} rows: a microbatch has {microbatch}"
        )
    lines = EpochOrder(made.lines, seed=seed, keep=keep)
    pictures = data.pictures if data.pictures is not None and data.pictures.any() else None
    if pictures is not None and packing in ("bfd_split", "wrapped"):
        raise NotImplementedError(
            f"not implemented yet: packing {packing!r} with pictures, which it would cut; use packing_strategy bfd"
        )
    if pictures is not None and packing and not isolate:
        raise NotImplementedError("not implemented yet: isolate_documents: false with pictures")
    stack = _Stack(accumulation, microbatch, made.longest, fixed=packing is not None, pictures=pictures)
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
        "pack": packing,
        "row_length": data.max_length,
        "seed": seed,
    }
    longest, useful = _usage(made.lengths, keep, stack, rows_per_step, seed)
    return Feed(
        batches=Batches(batches, fingerprint=fingerprint, name_of=data.name_of),
        steps=steps,
        steps_per_epoch=len(steps_of_epoch),
        data=data,
        longest=longest,
        longest_document=made.longest_document,
        useful=useful,
        notices=(*notices, *data.notices),
        packed=lay_out is not None or (packing is not None and isolate),
    )


class _Made(NamedTuple):
    """Lines, before their order and batches: how long those of one document are, the longest row of a batch that is
    allowed, and the most tokens that see one another.
    """

    lines: grain.MapDataset
    lengths: np.ndarray
    longest: int
    longest_document: int


def _lines(data: Data, packing: str | None, *, seed: int | None, isolate: bool) -> _Made:
    """Lines of one document, or of several."""
    lengths, length, documents = data.store.lengths, data.max_length, _Documents(data.store)
    longest_document = length if packing and not isolate else min(length, int(lengths.max()))
    lines: grain.MapDataset
    if packing == "wrapped":
        lines = Wrapped(documents.piece, lengths=lengths, length=length, seed=seed, isolate=isolate)
        return _Made(lines, lengths, length, longest_document)
    pieces = lengths
    if packing == "bfd_split":
        cut_up = _Pieces(documents, *cut(lengths, length), length)
        pieces, lines = cut_up.lengths(), grain.MapDataset.source(cut_up)
    else:
        lines = grain.MapDataset.source(documents)
    if packing is not None:
        lines = Packed(lines, lengths=pieces, plan=plan(pieces, length), seed=seed, isolate=isolate)
    return _Made(lines, lengths, length, longest_document)


def _answers(data: Data, lay_out: LayOut, microbatch: int) -> _Made:
    """Lines of a prompt with its answers."""
    answered = Answered(data.store, lay_out(data, microbatch), data.limit)
    lengths = answered.lengths()
    return _Made(grain.MapDataset.source(answered), lengths, int(lengths.max()), answered.longest_document())


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

    def piece(self, document: int, start: int, stop: int) -> Line:
        """Tokens `start` up to `stop` of a document."""
        return line_of(shift(*self.store[document], start, stop), document)


@dataclass(frozen=True)
class _Pieces:
    """Pieces of at most `length` tokens of the rows of a store, as lines."""

    parts: _Documents
    documents: np.ndarray  # of each piece
    starts: np.ndarray
    length: int

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Line:
        document, start = int(self.documents[index]), int(self.starts[index])
        return self.parts.piece(document, start, start + self.length)

    def lengths(self) -> np.ndarray:
        """Tokens of each piece."""
        return np.minimum(self.parts.store.lengths[self.documents] - self.starts, self.length)


@dataclass(frozen=True)
class _Stack:
    """Stacks the lines of a step: to `max_length` if `fixed`, else to the smallest bucket that holds the longest of
    them."""

    accumulation: int
    rows: int
    max_length: int
    fixed: bool
    pictures: RowPictures | None = None

    def __call__(self, lines: list[Line]) -> tuple[Batch, tuple[int, ...]]:
        longest = max(len(line.columns) for line in lines)
        length = self.max_length if self.fixed else bucket_length(longest, self.max_length)
        batch = collate(lines, accumulation=self.accumulation, rows=self.rows, length=length)
        if self.pictures is not None:
            batch |= arrays_of(
                lines, self.pictures, accumulation=self.accumulation, rows=self.rows, length=batch["tokens"].shape[-1]
            )
        return batch, tuple(row for line in lines for row in line.rows)
