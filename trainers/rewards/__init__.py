"""Reward functions that go by a name. A new one is a function in a file here, and a line in `REWARDS`.

A function has one of two forms, told by its arguments (`reward_call.py`): TRL's, `f(completions, **columns)`, gets all
answers and returns a number (or None: no opinion) for each; verl's, `f(data_source, solution_str, ground_truth,
extra_info)`, gets one answer and returns a number.
"""

from collections.abc import Callable
from typing import Any

from input_pipeline.functions import named_function

REWARDS = {
    **{
        f"{kind}_{length}tokens_completions": f"trainers.rewards.lengths:{kind}_{length}tokens_completions"
        for kind in ("soft", "sharp")
        for length in (5, 10, 20)
    },
    "overlong": "trainers.rewards.lengths:overlong",
    "count_letters": "trainers.rewards.letters:count_letters",
    "countdown": "trainers.rewards.countdown:countdown",
    "gsm8k": "trainers.rewards.gsm8k:gsm8k",
    "math_verify": "trainers.rewards.mathematics:math_verify",
    "json_valid": "trainers.rewards.texts:json_valid",
    "regex": "trainers.rewards.texts:regex",
}


def reward_function(name: str) -> Callable[..., Any]:
    """The function of a name, or of `file.py:function` and `module:function`; ValueError lists the names there are."""
    if ":" in name:
        return named_function(name, key="training.reward_functions")
    if name.lower() not in REWARDS:
        raise ValueError(
            f"training.reward_functions: {name!r} is not known; there are {', '.join(sorted(REWARDS))}; and yours, as"
            " file.py:function"
        )
    return named_function(REWARDS[name.lower()], key="training.reward_functions")


def text_of(completion: Any) -> str:
    """An answer's text: a string as it is, of messages the last one's content."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
