"""Answers from the training parameters: token ids, how they ended, and how likely each token was.

The engine is `models/engine.py`, how a token is drawn `models/sampling.py`; this is what callers use.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from models.decoder import Compute, DecoderConfig, Params
from models.engine import Answer, Request, Settings, answer_requests
from models.sampling import GREEDY, Sampling
from models.vision import Shown

__all__ = ["GREEDY", "Generated", "Sampling", "Shown", "complete", "generate", "stop_ids_of", "stream"]

SLOTS = 64  # answered at once; more prompts wait
BLOCK = 8  # decode steps in one dispatch: the host looks at the tokens, and fills free slots, this often

Decode = Callable[[Sequence[int]], str]


class Generated(NamedTuple):
    """One answer: `tokens` without what stopped it, and why it ended; `ids` are all that was drawn, the stop token too,
    with float32 log-probabilities of each under softmax(logits / temperature) (1 where greedy), and under the
    distribution it was drawn from, where cuts or a penalty make that another one.
    """

    tokens: list[int]
    finish: str  # "stop" or "length"
    ids: list[int]
    logprobs: np.ndarray
    warped_logprobs: np.ndarray | None


def complete(
    params: Params,
    config: DecoderConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Collection[int],
    sampling: Sampling = GREEDY,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    decode: Decode | None = None,
    compute: Compute | None = None,
    slots: int = SLOTS,
    block: int = BLOCK,
    shown: Sequence[Shown | None] | None = None,
) -> list[Generated]:
    """The answer to every prompt, of at most `max_new_tokens` (one number, or one for each).

    What is drawn depends on `seed` and on the prompt's number, `numbers` or its place: whoever generates in parts tells
    the numbers of the whole. An answer also ends where its text, by `decode`, has one of `stop_strings`; its tokens are
    then those whose text is before it. `slots` requests are answered at once, `block` steps between two looks of the
    host. `shown` are the prompts' pictures. ValueError for an empty prompt and settings that cannot be.
    """
    longest = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    numbers = range(len(prompts)) if numbers is None else numbers
    shown = [None] * len(prompts) if shown is None else shown
    if not len(prompts) == len(longest) == len(numbers) == len(shown):
        raise ValueError(
            f"generate: {len(prompts)} prompts, {len(longest)} of max_new_tokens, {len(numbers)} numbers, pictures of "
            f"{len(shown)}: one for each prompt is needed"
        )
    each = zip(prompts, numbers, longest, shown, strict=True)
    requests = [Request(tuple(prompt), number, most, seen) for prompt, number, most, seen in each]
    settings = Settings(sampling, stop_ids, seed, slots, block, _ends(stop_strings, decode))
    answers: dict[int, Answer] = {}
    compute = _compute(params, compute)
    for index, answer in answer_requests(params, config, requests, settings=settings, compute=compute):
        answers[index] = answer
    return [_generated(answers[index], sampling) for index in range(len(requests))]


def generate(
    params: Params,
    config: DecoderConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = GREEDY,
    seed: int = 0,
    compute: Compute | None = None,
    shown: Sequence[Shown | None] | None = None,
) -> list[list[int]]:
    """The new token ids of every prompt, up to and without the first stop id, at most `max_new_tokens` of them."""
    found = complete(
        params,
        config,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        sampling=sampling,
        seed=seed,
        compute=compute,
        shown=shown,
    )
    return [answer.tokens for answer in found]


def stream(
    params: Params,
    config: DecoderConfig,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = GREEDY,
    seed: int = 0,
    compute: Compute | None = None,
    shown: Shown | None = None,
) -> Iterator[int]:
    """The new token ids of one prompt, one by one as they are drawn."""
    settings = Settings(sampling, stop_ids, seed, slots=1, block=1)
    requests, given = [Request(tuple(prompt), 0, max_new_tokens, shown)], 0
    for _, answer in answer_requests(params, config, requests, settings=settings, compute=_compute(params, compute)):
        yield from answer.ids[given : answer.kept]
        given = answer.kept


def _compute(params: Params, compute: Compute | None) -> Compute:
    return compute or Compute(dtype=params["embed"]["embedding"].dtype)


def _generated(answer: Answer, sampling: Sampling) -> Generated:
    return Generated(
        answer.ids[: answer.kept],
        answer.finish,
        answer.ids,
        np.array(answer.logprobs, np.float32),
        np.array(answer.warped, np.float32) if sampling.warps else None,
    )


def _ends(strings: Sequence[str], decode: Decode | None) -> Callable[[Sequence[int]], tuple[int, int] | None] | None:
    """Where the text of ids reaches one of these strings: (ids up to there, ids whose text is before it)."""
    if not strings:
        return None
    if decode is None or not all(strings):
        raise ValueError("generate: stop_strings must not be empty, and need decode, which turns ids into text")

    def first(text: str) -> int | None:
        return min((at for string in strings if (at := text.find(string)) >= 0), default=None)

    def ends(ids: Sequence[int]) -> tuple[int, int] | None:
        if first(decode(ids)) is None:
            return None
        length = next(n for n in range(1, len(ids) + 1) if first(decode(ids[:n])) is not None)
        before = first(decode(ids[:length]))
        assert before is not None
        kept = max(n for n in range(length) if len(decode(ids[:n])) <= before)
        return length, kept

    return ends


def stop_ids_of(generation_config: dict[str, Any], tokenizer: Any) -> set[int]:
    """The ids that end an answer: those of `generation_config.json`, and the tokenizer's end of sequence."""
    declared = generation_config.get("eos_token_id")
    declared = declared if isinstance(declared, list) else [declared]
    return {int(token) for token in (*declared, tokenizer.eos_token_id) if token is not None}
