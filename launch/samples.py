"""Sample answers: the same few prompts, answered before and after training, for the report."""

import logging
from typing import Any

import jax
from ml_collections import ConfigDict

from input_pipeline.catalog import Entry, open_dataset
from input_pipeline.examples import Chat, RowError
from input_pipeline.template import Template
from launch.assemble import Model
from models.generate import generate, stop_ids_of
from trainers.report import Sample

log = logging.getLogger("einkorn")

HOW_MANY = 3
LONGEST_PROMPT = 512  # tokens
LONGEST_ANSWER = 96  # tokens


class Samples:
    """The prompts of a run: from the validation split, or from the training data where there is none."""

    def __init__(self, model: Model, chats: list[tuple[list[int], str, str]]):
        self._model = model
        self._chats = chats
        self._answers: dict[str, list[str]] = {}

    @classmethod
    def of(cls, config: ConfigDict, model: Model) -> "Samples":
        """The first chats of a split that end with an answer; none with several processes, or where rows are no
        chats.
        """
        split = config.data.validation if config.data.validation.datasets else config.data.train
        if jax.process_count() > 1 or not model.tokenizer.chat_template:
            return cls(model, [])
        field = config.training.trainer_kwargs.dataset_text_field
        return cls(model, _first_chats(split.datasets[0], model.tokenizer, text_field=field))

    def before(self, params: Any) -> None:
        """Answer with the parameters that training starts from."""
        self._answer("before", params)

    def after(self, params: Any) -> None:
        """Answer with the trained parameters."""
        self._answer("after", params)

    def all(self) -> list[Sample]:
        """The prompts with all that was answered."""
        unasked = ["(a resumed run)"] * len(self._chats)
        answers = zip(self._answers.get("before", unasked), self._answers.get("after", unasked), strict=True)
        return [
            Sample(prompt, before, after, expected)
            for (_, prompt, expected), (before, after) in zip(self._chats, answers, strict=True)
        ]

    def _answer(self, when: str, params: Any) -> None:
        if not self._chats:
            return
        tokenizer = self._model.tokenizer
        ids = generate(
            params,
            self._model.config,
            [prompt for prompt, _, _ in self._chats],
            max_new_tokens=LONGEST_ANSWER,
            stop_ids=stop_ids_of(self._model.generation_config or {}, tokenizer),
        )
        self._answers[when] = [tokenizer.decode(answer, skip_special_tokens=True) for answer in ids]


def _first_chats(entry: Any, tokenizer: Any, *, text_field: str) -> list[tuple[list[int], str, str]]:
    """(prompt ids, the user's last words, the answer in the data) of the first usable chats."""
    dataset = open_dataset(Entry.of(entry), skip_bad_rows=True, text_field=text_field)
    template = Template(tokenizer)
    found: list[tuple[list[int], str, str]] = []
    for row in range(min(len(dataset), 10 * HOW_MANY)):
        try:
            example = dataset.example(row)
            if not isinstance(example, Chat) or len(example.messages) < 2:
                continue
            *prompt, answer = example.messages
            if answer["role"] != "assistant" or not isinstance(answer.get("content"), str):
                continue
            tools = list(example.tools) if example.tools else None
            text = template.text(template.prepare(prompt), tools, prompt=True, **dict(example.template_kwargs or {}))
        except RowError:
            continue
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= LONGEST_PROMPT:
            found.append((ids, str(prompt[-1].get("content")), answer["content"]))
        if len(found) == HOW_MANY:
            break
    return found
