"""Text with trained spans becomes token ids with a trained flag each, cut to the longest length allowed.

A text is tokenised in one piece, since pieces would give other ids at their seams; spans are carried over by the
tokenizer's own offsets. A token is trained if it begins inside a trained span, or reaches into one: where the
generation prompt ends in a space that the answer's first token takes up ("ASSISTANT: " + "Yes" → " Yes"), the model
is not given that token, so it has to learn it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from input_pipeline.chat import CURE, Rendered, Trained
from input_pipeline.examples import RowError
from input_pipeline.words import Words

_NOWHERE = np.empty((0, 2), np.int64)  # the offsets of a text where none are needed


class Tokens(NamedTuple):
    """Token ids int32 [n], which of them are trained bool [n], whether tokens were cut off at the end, and the UTF-8
    bytes of the text that the others spell, without the end-of-sequence token of plain text."""

    ids: np.ndarray
    trained: np.ndarray
    over_long: bool
    text_bytes: int


def encode(
    rendered: Sequence[Rendered], tokenizer: Any, *, max_length: int | None, words: Words | None = None
) -> list[Tokens | RowError]:
    """Tokenise texts and say which tokens are trained; tokens past `max_length` are cut off the end afterwards.

    `words` (see `words_of`) makes it faster, by what came before. Where a row's trained part cannot be told, its place
    in the list holds the RowError.
    """
    by = words or Whole(tokenizer)
    encoded: dict[int, Tokens | RowError] = {}
    for special_tokens in (False, True):
        rows = {i: row for i, row in enumerate(rendered) if row.special_tokens == special_tokens}
        asked = sorted({given for row in rows.values() for given in _given(row)})
        given_ids = dict(zip(asked, by.tokenize(asked, special_tokens=special_tokens), strict=True))
        texts = [row.text for row in rows.values()]
        if any(row.trained for row in rows.values()):
            all_ids, offsets = by.locate(texts, special_tokens=special_tokens)
        else:
            most = None if max_length is None else max_length + 1  # one more, to know that there are more
            all_ids, offsets = by.tokenize(texts, special_tokens=special_tokens, most=most), [_NOWHERE] * len(texts)
        for (i, row), ids, places in zip(rows.items(), all_ids, offsets, strict=True):
            try:
                trained = _trained(row, ids, places, given_ids)
            except RowError as error:
                encoded[i] = error
                continue
            kept = ids[:max_length]
            spelled = row.text if len(kept) == len(ids) else tokenizer.decode(kept)
            text_bytes = _bytes(spelled, ending=tokenizer.eos_token if special_tokens else None)
            encoded[i] = Tokens(kept, trained[:max_length], len(kept) < len(ids), text_bytes)
    return [encoded[i] for i in range(len(rendered))]


def common_prefix(a: ArrayLike, b: ArrayLike) -> int:
    """The number of leading items that two sequences share."""
    a, b = np.asarray(a), np.asarray(b)
    shortest = min(len(a), len(b))
    same = a[:shortest] == b[:shortest]
    return shortest if same.all() else int(np.argmin(same))


def token_bounds(offsets: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Where each token begins and ends in the text, in characters, from the tokenizer's offsets [n, 2].

    Some tokenizers leave the space before a word out of the word's token in their offsets though it is part of it;
    characters between two tokens belong to the second.
    """
    spans = np.asarray(offsets, np.int64).reshape(-1, 2)
    ends_before = np.maximum.accumulate(np.concatenate([[0], spans[:-1, 1]]))
    return np.minimum(spans[:, 0], ends_before), spans[:, 1]


def _trained(row: Rendered, ids: np.ndarray, offsets: np.ndarray, given_ids: dict[str, np.ndarray]) -> np.ndarray:
    trained = np.full(len(ids), row.trained is None)
    if row.trained:
        starts, ends = token_bounds(offsets)
        for span in row.trained:
            inside = ((starts >= span.start) | (ends > span.start)) & (starts < span.end)
            if span.given is not None:
                inside[: _first_difference(span, ids, starts, given_ids[span.given])] = False
            trained |= inside
    if row.prompt is not None:
        trained[: common_prefix(given_ids[row.prompt], ids)] = False
    return trained


def _first_difference(span: Trained, ids: np.ndarray, starts: np.ndarray, given: np.ndarray) -> int:
    """The first token of a turn that the model is not given; some token of the turn must be given."""
    same = common_prefix(given, ids)
    if same < len(starts) and starts[same] <= span.start:
        raise RowError(f"the chat template's generation prompt shares no token with the assistant's turn. {CURE}")
    return same


def _given(row: Rendered) -> list[str]:
    given = [span.given for span in row.trained or () if span.given is not None]
    return [*given, row.prompt] if row.prompt is not None else given


def _bytes(text: str, *, ending: str | None) -> int:
    return len((text.removesuffix(ending) if ending else text).encode())


@dataclass(frozen=True)
class Whole:
    """Texts tokenised as a whole, each by itself, by any fast tokenizer."""

    tokenizer: Any

    def tokenize(self, texts: Sequence[str], *, special_tokens: bool, most: int | None = None) -> list[np.ndarray]:
        """The ids of each text int32 [n]; all of them, whatever `most` says."""
        return [np.asarray(e.ids, np.int32) for e in self._encodings(texts, special_tokens, offsets=False)]

    def locate(self, texts: Sequence[str], *, special_tokens: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The ids of each text int32 [n], and where each token stands in it int64 [n, 2]."""
        encodings = self._encodings(texts, special_tokens, offsets=True)
        flat = itertools.chain.from_iterable
        places = [np.fromiter(flat(e.offsets), np.int64, 2 * len(e)).reshape(-1, 2) for e in encodings]
        return [np.asarray(e.ids, np.int32) for e in encodings], places

    def _encodings(self, texts: Sequence[str], special_tokens: bool, *, offsets: bool) -> Sequence[Any]:
        """What the library `tokenizers` makes of each text.

        It is asked directly: transformers' wrapper has it note offsets that most rows do not need, an eighth of its
        time.
        """
        if not texts:
            return []
        if not _plain(self.tokenizer):
            made = self.tokenizer(
                list(texts), add_special_tokens=special_tokens, return_token_type_ids=False, verbose=False
            )
            return made.encodings
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens != self.tokenizer.split_special_tokens:
            backend.encode_special_tokens = self.tokenizer.split_special_tokens
        encode_batch = backend.encode_batch if offsets else backend.encode_batch_fast
        return encode_batch(texts, add_special_tokens=special_tokens)


def words_of(tokenizer: Any) -> Words | None:
    """What makes `encode` faster for texts with words in common; None where the tokenizer does not allow it."""
    if not _plain(tokenizer) or tokenizer.split_special_tokens:
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return Words.of(backend)


def _plain(tokenizer: Any) -> bool:
    """Whether transformers does no more than hand texts to the library: some tokenizers have steps of their own."""
    from transformers import PreTrainedTokenizerFast

    steps = ("__call__", "_encode_plus", "_switch_to_input_mode")
    return all(getattr(type(tokenizer), step, None) is getattr(PreTrainedTokenizerFast, step, None) for step in steps)
