"""Sample answers: the same few prompts, answered by the model before and after training, for the report."""

from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from input_pipeline.catalog import Entry, open_dataset
from input_pipeline.examples import Chat, RowError
from input_pipeline.template import Template
from launch.assemble import Model
from models.decoder import Compute, Params
from models.generate import generate, stop_ids_of
from trainers.report import Sample

HOW_MANY = 3
LONGEST_PROMPT = 512  # tokens
LONGEST_ANSWER = 64  # tokens


def sample_answers(config: ConfigDict, model: Model, *, after: Params, before: Callable[[], Params]) -> list[Sample]:
    """The first chats of the validation split (of the training data where there is none) that end with an answer, each
    answered by both models. None with several processes, or where rows are no chats.

    `before` gives the parameters that training started from; it is called at the end, so that no run waits for its
    first step, and a resumed one has them too.
    """
    split = config.data.validation if config.data.validation.datasets else config.data.train
    if jax.process_count() > 1 or not model.tokenizer.chat_template:
        return []
    chats = _first_chats(
        split.datasets[0], model.tokenizer, text_field=config.training.trainer_kwargs.dataset_text_field
    )
    if not chats:
        return []
    prompts = [prompt for prompt, _, _ in chats]
    new = _answers(model, after, prompts)
    old = _answers(model, before(), prompts)
    return [
        Sample(asked, answer_before, answer_after, expected)
        for (_, asked, expected), answer_before, answer_after in zip(chats, old, new, strict=True)
    ]


def _answers(model: Model, params: Params, prompts: list[list[int]]) -> list[str]:
    stop_ids = stop_ids_of(model.generation_config or {}, model.tokenizer)
    compute = Compute(dtype=params["embed"]["embedding"].dtype, lora=model.lora)
    ids = generate(params, model.config, prompts, max_new_tokens=LONGEST_ANSWER, stop_ids=stop_ids, compute=compute)
    return [model.tokenizer.decode(answer, skip_special_tokens=True) for answer in ids]


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
