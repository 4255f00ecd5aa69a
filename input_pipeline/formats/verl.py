"""`{"data_source": "…", "prompt": […], "ability": "…", "reward_model": {"style": "rule", "ground_truth": …},
"extra_info": {…}}`, as verl reads it: messages to be answered, and what its reward functions are called with."""

from collections.abc import Mapping, Sequence
from typing import Any

from input_pipeline import fields
from input_pipeline.examples import Prompt, RowError, show
from input_pipeline.formats import prompt


def matches(row: Mapping[str, Any]) -> bool:
    return all(row.get(name) is not None for name in ("prompt", "data_source", "reward_model"))


def parse(row: Mapping[str, Any]) -> Prompt:
    messages, reward = row.get("prompt"), row.get("reward_model")
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise RowError(f"prompt must be a list of messages, not {show(messages)}")
    fields.text(row.get("data_source"), "data_source")
    if not isinstance(reward, Mapping) or reward.get("ground_truth") is None:
        raise RowError(f'reward_model must be {{"style": …, "ground_truth": …}}, not {show(reward)}')
    if not isinstance(row.get("extra_info") or {}, Mapping):
        raise RowError(f"extra_info must be an object, not {show(row['extra_info'])}")
    return prompt.parse(row)
