"""Sample answers: the same few prompts, answered by the model before and after training, for the report."""

from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from configs import derived
from input_pipeline.catalog import Entry, open_dataset
from input_pipeline.examples import Chat, Example, Feedback, Message, Preference, RowError
from input_pipeline.formats.conversation import as_messages
from input_pipeline.template import Template
from launch.assemble import Model
from models.decoder import Compute, Params
from models.generate import generate, stop_ids_of
from trainers.report import Sample

HOW_MANY = 3
LONGEST_PROMPT = 512  # tokens
LONGEST_ANSWER = 64  # tokens


def sample_answers(
    config: ConfigDict, model: Model, *, packed: bool, after: Params, before: Callable[[], Params]
) -> list[Sample]:
    """The first chats of the validation split (of the training data where there is none) that end with an answer, or
    with a preferred one, each answered by both models. None with several processes, or where rows are no chats.

    `before` gives the parameters that training started from; it is called at the end, so that no run waits for its
    first step, and a resumed one has them too. Attention is computed as in training, whose rows may be `packed`.
    """
    split = config.data.validation if config.data.validation.datasets else config.data.train
    if jax.process_count() > 1 or not model.tokenizer.chat_template:
        return []
    chats = _first_chats(
        split.datasets[0],
        model.tokenizer,
        text_field=config.training.trainer_kwargs.dataset_text_field,
        trainer=config.training.trainer_type,
    )
    if not chats:
        return []
    prompts = [prompt for prompt, _, _ in chats]
    how = {"attention": derived.attention(config), "packed": packed}
    new = _answers(model, after, prompts, how)
    old = _answers(model, before(), prompts, how)
    return [
        Sample(asked, answer_before, answer_after, expected)
        for (_, asked, expected), answer_before, answer_after in zip(chats, old, new, strict=True)
    ]


def _answers(model: Model, params: Params, prompts: list[list[int]], how: dict[str, Any]) -> list[str]:
    stop_ids = stop_ids_of(model.generation_config or {}, model.tokenizer)
    compute = Compute(dtype=params["embed"]["embedding"].dtype, lora=model.lora, **how)
    ids = generate(params, model.config, prompts, max_new_tokens=LONGEST_ANSWER, stop_ids=stop_ids, compute=compute)
    return [model.tokenizer.decode(answer, skip_special_tokens=True) for answer in ids]


def _first_chats(entry: Any, tokenizer: Any, *, text_field: str, trainer: str) -> list[tuple[list[int], str, str]]:
    """(prompt ids, the user's last words, the answer in the data) of the first usable chats."""
    dataset = open_dataset(Entry.of(entry), skip_bad_rows=True, text_field=text_field, trainer=trainer)
    template = Template(tokenizer)
    found: list[tuple[list[int], str, str]] = []
    for row in range(min(len(dataset), 10 * HOW_MANY)):
        try:
            example = dataset.example(row)
            asked, answer = _asked(example)
            if (
                not asked
                or answer is None
                or answer["role"] != "assistant"
                or not isinstance(answer.get("content"), str)
            ):
                continue
            tools = list(getattr(example, "tools", None) or ()) or None
            kwargs = dict(getattr(example, "template_kwargs", None) or {})
            text = template.text(template.prepare(asked), tools, prompt=True, **kwargs)
        except RowError:
            continue
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= LONGEST_PROMPT:
            found.append((ids, str(asked[-1].get("content")), answer["content"]))
        if len(found) == HOW_MANY:
            break
    return found


def _asked(example: Example | None) -> tuple[tuple[Message, ...], Message | None]:
    """The messages of a prompt, and the answer to it that the data has; none where the row is no such thing."""
    if isinstance(example, Chat):
        return example.messages[:-1], example.messages[-1]
    if isinstance(example, Preference):
        return as_messages(example.prompt, "user"), as_messages(example.chosen, "assistant")[-1]
    if isinstance(example, Feedback) and example.label:
        return as_messages(example.prompt, "user"), as_messages(example.completion, "assistant")[-1]
    return (), None
