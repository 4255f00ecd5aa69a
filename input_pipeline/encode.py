"""Text with trained spans becomes token ids with a trained flag each, cut to the longest length allowed.

A text is tokenised in one piece, since pieces would give other ids at their seams; spans are carried over by the
tokenizer's own offsets. A token is trained if it begins inside a trained span, or reaches into one: where the
generation prompt ends in a space that the answer's first token takes up ("ASSISTANT: " + "Yes" → " Yes"), the model
is not given that token, so it has to learn it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from input_pipeline.chat import CURE, Rendered, Trained
from input_pipeline.examples import RowError


class Tokens(NamedTuple):
    """Token ids int32 [n], which of them are trained bool [n], and whether tokens were cut off at the end."""

    ids: np.ndarray
    trained: np.ndarray
    over_long: bool


def encode(rendered: Sequence[Rendered], tokenizer: Any, *, max_length: int | None) -> list[Tokens | RowError]:
    """Tokenise texts and say which tokens are trained; tokens past `max_length` are cut off the end afterwards.

    Where a row's trained part cannot be told, its place in the list holds the RowError.
    """
    encoded: dict[int, Tokens | RowError] = {}
    for special_tokens in (False, True):
        rows = {i: row for i, row in enumerate(rendered) if row.special_tokens == special_tokens}
        asked = sorted({given for row in rows.values() for given in _given(row)})
        given_ids = dict(zip(asked, _tokenize(tokenizer, asked, special_tokens)[0], strict=True))
        offsets = any(row.trained for row in rows.values())
        texts = _tokenize(tokenizer, [row.text for row in rows.values()], special_tokens, offsets=offsets)
        for i, ids, bounds in zip(rows, *texts, strict=True):
            tokens = np.asarray(ids, np.int32)
            try:
                trained = _trained(rows[i], tokens, bounds, given_ids)
            except RowError as error:
                encoded[i] = error
            else:
                over_long = max_length is not None and len(tokens) > max_length
                encoded[i] = Tokens(tokens[:max_length], trained[:max_length], over_long)
    return [encoded[i] for i in range(len(rendered))]


def common_prefix(a: ArrayLike, b: ArrayLike) -> int:
    """The number of leading items that two sequences share."""
    a, b = np.asarray(a), np.asarray(b)
    shortest = min(len(a), len(b))
    same = a[:shortest] == b[:shortest]
    return shortest if same.all() else int(np.argmin(same))


def token_bounds(offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Where each token begins and ends in the text, in characters.

    Some tokenizers leave the space before a word out of the word's token in their offsets though it is part of it;
    characters between two tokens belong to the second.
    """
    spans = np.asarray(offsets, np.int64).reshape(-1, 2)
    ends_before = np.maximum.accumulate(np.concatenate([[0], spans[:-1, 1]]))
    return np.minimum(spans[:, 0], ends_before), spans[:, 1]


def _trained(
    row: Rendered, ids: np.ndarray, offsets: Sequence[tuple[int, int]], given_ids: dict[str, list[int]]
) -> np.ndarray:
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


def _first_difference(span: Trained, ids: np.ndarray, starts: np.ndarray, given: Sequence[int]) -> int:
    """The first token of a turn that the model is not given; some token of the turn must be given."""
    same = common_prefix(given, ids)
    if same < len(starts) and starts[same] <= span.start:
        raise RowError(f"the chat template's generation prompt shares no token with the assistant's turn. {CURE}")
    return same


def _given(row: Rendered) -> list[str]:
    given = [span.given for span in row.trained or () if span.given is not None]
    return [*given, row.prompt] if row.prompt is not None else given


def _tokenize(
    tokenizer: Any, texts: list[str], special_tokens: bool, *, offsets: bool = False
) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """The ids of each text, and where each token stands in it (nothing without `offsets`)."""
    if not texts:
        return [], []
    encoding = tokenizer(
        texts,
        add_special_tokens=special_tokens,
        return_offsets_mapping=offsets,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoding["input_ids"], encoding["offset_mapping"] if offsets else [[] for _ in texts]
