"""Texts tokenised word by word, each word once: the tokenizer's own ids, in about half of its time.

Byte-level BPE cuts a text by a regular expression before anything else, and what it makes of each part depends on that
part alone. So a text may be cut wherever the expression is sure to cut it, and a part that came before be looked up.
For the expressions in `_KNOWN` that is before a space that follows what is no white space: no match goes on over it,
and none looks at what comes after it. Tokens that were added to the vocabulary are found in the text beforehand, and
cut it as well. Any other tokenizer is asked for the whole text.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# White space, what follows it, and all after that until a space which may be cut before.
_PART = re.compile(r"\s*\S+(?:[^\S ]\s*\S*)*|\s+")
_KNOWN = {
    # of GPT-2, and of ByteLevel itself
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Llama 3, GPT-4
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    # Qwen 2 and later
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}
_REMEMBERED = 200_000  # parts, of some 250 bytes each; English chats have 80,000 in two million tokens
_PORTION = 200_000  # characters of texts that are cut at a time
_LONG = 64  # characters; longer parts hardly come twice


@dataclass(frozen=True)
class Words:
    """The parts of texts that came before: the ids of each, and where its tokens stand in it.

    `added` finds the tokens that were added to the vocabulary; `around` are the special tokens that the tokenizer puts
    before and after a text.
    """

    backend: Any  # of the library tokenizers
    added: re.Pattern[str]
    around: tuple[list[int], list[int]]
    _ids: dict[str, list[int]] = field(default_factory=dict, repr=False)
    _offsets: dict[str, list[int]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, backend: Any) -> "Words | None":
        """The words of a tokenizer, or None where its texts cannot be cut in this way."""
        rules = json.loads(backend.to_str())
        added = rules["added_tokens"]
        if not (
            _bytes(rules["model"])
            and rules["normalizer"] in (None, {"type": "NFC"})  # no space ever becomes one with what is before it
            and _cuts_at_spaces(rules["pre_tokenizer"])
            and _keeps_offsets(rules["post_processor"])
            and not any(token[flag] for token in added for flag in ("lstrip", "rstrip", "single_word", "normalized"))
            and not any(re.search(r"\s", token["content"]) for token in added)
        ):
            return None
        longest_first = sorted((re.escape(token["content"]) for token in added), key=len, reverse=True)
        alone, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        at = next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
        around = (whole[:at], whole[at + len(alone) :])
        return cls(backend, re.compile(f"({'|'.join(longest_first) or '(?!)'})"), around)

    def tokenize(self, texts: Sequence[str], *, special_tokens: bool, most: int | None = None) -> list[np.ndarray]:
        """The ids of each text int32 [n]; with `most`, at least so many of the first where there are as many."""
        before, after = self.around if special_tokens else ([], [])
        ids = []
        for some in _portions(texts):
            parts = [self._parts(text)[:most] for text in some]
            new = self._learn(parts, self._ids)
            ids += [np.asarray([*before, *_flat(map(self._ids.__getitem__, of)), *after], np.int32) for of in parts]
            self._forget(new)
        return ids

    def locate(self, texts: Sequence[str], *, special_tokens: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The ids of each text int32 [n], and where each token stands in it int64 [n, 2]; without special tokens."""
        assert not special_tokens, "only chats have trained spans, and their special tokens stand in the text"
        ids, places = [], []
        for some in _portions(texts):
            parts = [self._parts(text) for text in some]
            new = self._learn(parts, self._offsets)
            ids += [np.asarray([*_flat(map(self._ids.__getitem__, of))], np.int32) for of in parts]
            places += [self._places(of) for of in parts]
            self._forget(new)
        return ids, places

    def _places(self, parts: list[str]) -> np.ndarray:
        within = np.asarray([*_flat(map(self._offsets.__getitem__, parts))], np.int64).reshape(-1, 2)
        starts = np.cumsum([0, *map(len, parts)])[:-1]
        return within + np.repeat(starts, [len(self._ids[part]) for part in parts])[:, None]

    def _parts(self, text: str) -> list[str]:
        parts: list[str] = []
        for i, piece in enumerate(self.added.split(text)):
            parts += [piece] if i % 2 else _PART.findall(piece)
        return parts

    def _learn(self, parts: Iterable[Sequence[str]], table: Mapping[str, Any]) -> list[str]:
        """Tokenise the parts that `table` does not have, and return them."""
        new = list(set(_flat(parts)).difference(table))
        located = table is self._offsets
        encode = self.backend.encode_batch if located else self.backend.encode_batch_fast
        encodings = encode(new, add_special_tokens=False)
        self._ids.update(zip(new, (encoding.ids for encoding in encodings), strict=True))
        if located:
            self._offsets.update(zip(new, ([*_flat(e.offsets)] for e in encodings), strict=True))
        return new

    def _forget(self, new: Iterable[str]) -> None:
        """Keep what is likely to come again, and not too much of it."""
        for table in (self._ids, self._offsets):
            if len(table) > _REMEMBERED:
                table.clear()
            for part in new:
                if len(part) > _LONG:
                    table.pop(part, None)


_flat = itertools.chain.from_iterable


def _portions(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in turn, some at a time: their parts take fifteen times their memory."""
    start, characters = 0, 0
    for i, text in enumerate(texts):
        characters += len(text)
        if characters > _PORTION:
            yield texts[start : i + 1]
            start, characters = i + 1, 0
    yield texts[start:]


def _bytes(model: Mapping[str, Any]) -> bool:
    """Byte-level BPE that makes the same of a part each time."""
    affixes = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
    return model["type"] == "BPE" and not model.get("dropout") and not any(affixes)


def _cuts_at_spaces(rule: Mapping[str, Any] | None) -> bool:
    """Whether texts are cut before every space that follows what is no white space, come what may beside it."""
    if rule is None:
        return False
    steps = rule["pretokenizers"] if rule["type"] == "Sequence" else [rule]
    *first, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    cut = [step for step in first if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]]
    known = all(step["pattern"].get("Regex") in _KNOWN for step in cut)
    rest = [step for step in first if step not in cut]
    return known and bool(cut or last["use_regex"]) and all(step["type"] == "Digits" for step in rest)


def _keeps_offsets(rule: Mapping[str, Any] | None) -> bool:
    """Whether the last step, which may add special tokens, leaves where the others stand alone."""
    if rule is None or rule["type"] == "TemplateProcessing":
        return True
    if rule["type"] == "Sequence":
        return all(map(_keeps_offsets, rule["processors"]))
    return rule["type"] == "ByteLevel" and not rule["add_prefix_space"]
