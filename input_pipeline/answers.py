"""A prompt with the answers to it becomes token ids: where the prompt ends is settled in tokens, not in characters.

Two ways to cut. TRL's: prompt, and prompt with each answer, are tokenised each in one piece, and the prompt is what all
of them begin with; no token is merged across that boundary. Oumi's: the prompt is rendered without the generation
prompt, an answer is what the template adds for it (the assistant's header too), each is tokenised by itself, and the
end-of-sequence token follows in any case.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from input_pipeline import fields
from input_pipeline.encode import Tokens, Whole, common_prefix
from input_pipeline.examples import Example, Feedback, Message, Preference, RowError, Side
from input_pipeline.formats.conversation import as_messages
from input_pipeline.template import Template
from input_pipeline.words import Words

WANTED, UNWANTED = 1, 2  # how the tokens of an answer are marked; those of its prompt are 0
LEFT_OUT = (
    "the tokens of a prompt do not all begin its answers' texts: where they differ, the prompt's last ones are left out"
    " of training (as in TRL). End prompts at the end of a word, or use another chat template"
)


class Asked(NamedTuple):
    """A prompt and its answers as text: each answer with the prompt before it (`whole`), or alone, and its mark."""

    prompt: str
    answers: tuple[str, ...]
    marks: tuple[int, ...]
    whole: bool
    special_tokens: bool  # whether the tokenizer adds its own


def render_answers(example: Example, template: Template, style: str) -> Asked:
    """The texts of a preference pair or of an answer with a label, in the style "trl" or "oumi"; RowError where the
    template does not take them.
    """
    answers: tuple[Side, ...]
    marks: tuple[int, ...]
    if isinstance(example, Preference):
        answers, marks = (example.chosen, example.rejected), (WANTED, UNWANTED)
    elif isinstance(example, Feedback):
        answers, marks = (example.completion,), (WANTED if example.label else UNWANTED,)
    else:
        raise RowError(f"is an example ({type(example).__name__}) without answers to learn from")
    if isinstance(example.prompt, str) and style == "trl":
        asked = _of_strings(example.prompt, answers, marks, template)
    else:
        asked = _of_messages(example, answers, marks, template, oumi=style == "oumi")
    for text in (asked.prompt, *asked.answers):
        fields.text(text, "the rendered row")
    return asked


def encode_answers(
    asked: Sequence[Asked], tokenizer: Any, *, max_length: int | None, notices: set[str], words: Words | None = None
) -> list[Tokens | RowError]:
    """Token ids of every row: of each answer its prompt and itself, cut to `max_length`, one after the other.

    `Tokens.trained` holds marks, uint8: 0 of prompts, 1 of a wanted answer, 2 of an unwanted one. A prompt of
    `max_length` tokens or more leaves no room for an answer: nothing of its row is marked. A single answer is kept as
    long as any prompt could leave it room, since it may be set beside another row's (`pairs.Answered` cuts it).
    """
    by = words or Whole(tokenizer)
    ids: dict[tuple[bool, str], np.ndarray] = {}
    for special in (False, True):
        texts = sorted({text for row in asked if row.special_tokens == special for text in (row.prompt, *row.answers)})
        found = by.tokenize(texts, special_tokens=special)
        ids |= {(special, text): each for text, each in zip(texts, found, strict=True)}
    encoded: list[Tokens | RowError] = []
    for row in asked:
        try:
            prompt, answers = _divided(row, ids, tokenizer, notices)
        except RowError as error:
            encoded.append(error)
            continue
        text_bytes = sum(len(text.encode()) for text in row.answers)
        encoded.append(_cut(prompt, answers, row.marks, max_length=max_length, text_bytes=text_bytes))
    return encoded


def answers_in(tokens: Tokens) -> int:
    """How many answers, each with its prompt before it, the tokens of a row hold."""
    answered = tokens.trained != 0
    return int(np.count_nonzero(answered[1:] & ~answered[:-1]))


def _of_strings(prompt: str, answers: Sequence[Side], marks: tuple[int, ...], template: Template) -> Asked:
    eos = template.tokenizer.eos_token
    if eos is None:
        raise RowError("the tokenizer has no end-of-sequence token, with which plain answers must end", "template")
    texts = tuple(prompt + (str(a) if str(a).endswith(eos) else f"{a}{eos}") for a in answers)
    return Asked(prompt, texts, marks, whole=True, special_tokens=True)


def _of_messages(
    example: Preference | Feedback, answers: Sequence[Side], marks: tuple[int, ...], template: Template, *, oumi: bool
) -> Asked:
    if not template.tokenizer.chat_template:
        raise RowError("the tokenizer has no chat template; set model.chat_template", "template")
    tools, kwargs = list(example.tools or ()) or None, dict(example.template_kwargs or {})
    before = as_messages(example.prompt, "user")

    def text(messages: Sequence[Message], *, prompt: bool = False) -> str:
        return template.text(template.prepare(messages), tools, prompt=prompt, **kwargs)

    texts = tuple(text((*before, *as_messages(answer, "assistant"))) for answer in answers)
    beginning = text(before, prompt=not oumi)
    if not oumi:
        return Asked(beginning, texts, marks, whole=True, special_tokens=False)
    if not all(each.startswith(beginning) for each in texts):
        raise RowError(
            "the chat template renders the prompt otherwise once an answer follows; set trainer_kwargs.answer_tokens:"
            " trl",
            "template",
        )
    return Asked(beginning, tuple(t[len(beginning) :] for t in texts), marks, whole=False, special_tokens=False)


def _divided(
    row: Asked, ids: dict[tuple[bool, str], np.ndarray], tokenizer: Any, notices: set[str]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The ids of the prompt and those of its answers."""
    prompt, answers = ids[row.special_tokens, row.prompt], [ids[row.special_tokens, text] for text in row.answers]
    if row.whole:
        shared = min(common_prefix(prompt, answer) for answer in answers)
        if shared < len(prompt):
            notices.add(LEFT_OUT)
        prompt, answers = prompt[:shared], [answer[shared:] for answer in answers]
    else:
        if tokenizer.eos_token_id is None:
            raise RowError("the tokenizer has no end-of-sequence token, with which answers must end", "template")
        answers = [np.append(answer, np.int32(tokenizer.eos_token_id)) for answer in answers]
    if not len(prompt):
        raise RowError("no token of the prompt begins its answers' texts, so nothing predicts their first one", "empty")
    if not all(map(len, answers)):
        raise RowError("an answer adds no token to the prompt", "empty")
    return prompt, answers


def _cut(
    prompt: np.ndarray, answers: list[np.ndarray], marks: Sequence[int], *, max_length: int | None, text_bytes: int
) -> Tokens:
    """Prompt and answer, prompt and answer, …, each cut at its end."""
    room = None if max_length is None else max(0, max_length - len(prompt))
    over_long = room is not None and any(len(answer) > room for answer in answers)
    if room == 0:
        return Tokens(prompt[:0], np.zeros(0, np.uint8), over_long, 0)
    longest = room if max_length is None or len(answers) > 1 else max_length - 1
    kept = [answer[:longest] for answer in answers]
    none = np.zeros(len(prompt), np.uint8)
    ids = np.concatenate([part for answer in kept for part in (prompt, answer)])
    of_each = zip(kept, marks, strict=True)
    marked = np.concatenate([part for a, mark in of_each for part in (none, np.full(len(a), mark, np.uint8))])
    return Tokens(ids.astype(np.int32), marked, over_long, text_bytes)
