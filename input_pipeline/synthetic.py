"""Small made-up datasets, one for each method: what `dataset_name: debug_sft` and its like are, row for row as in Oumi.

Each function takes the number of rows, `dataset_kwargs.dataset_size`.
"""

from typing import Any

_QUESTION, _ANSWER = "Hello, how are you? (Document number {})", "I'm fine, thank you! (Document number {})"


def debug_sft(dataset_size: int = 5) -> list[dict[str, Any]]:
    """Conversations of two turns."""
    return [
        {
            "messages": [
                {"role": "user", "content": _QUESTION.format(i)},
                {"role": "assistant", "content": _ANSWER.format(i)},
            ]
        }
        for i in range(_positive(dataset_size))
    ]


def debug_dpo(dataset_size: int = 5) -> list[dict[str, Any]]:
    """Preference pairs."""
    return [
        {"prompt": _QUESTION.format(i), "chosen": _ANSWER.format(i), "rejected": f"fine (Document number {i})"}
        for i in range(_positive(dataset_size))
    ]


def debug_kto(dataset_size: int = 5) -> list[dict[str, Any]]:
    """Answers with a label, every second one unwanted."""
    return [
        {"prompt": _QUESTION.format(i), "completion": _ANSWER.format(i), "label": i % 2 == 0}
        for i in range(_positive(dataset_size))
    ]


def debug_pretraining(dataset_size: int = 1000) -> list[dict[str, Any]]:
    """Documents of one sentence."""
    return [{"text": f"This is document number {i}."} for i in range(_positive(dataset_size))]


def _positive(size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"dataset_kwargs.dataset_size must be a whole number above 0, not {size!r}")
    return size
