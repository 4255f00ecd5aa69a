"""`{"instruction": "…", "input": "…", "output": "…"}`, the fields of the Alpaca data.

Without a system prompt the user's turn is instruction, blank line, input. With `system_prompt=True` (how the data
sets tatsu-lab/alpaca and yahma/alpaca-cleaned are read) it is laid out as in the original prompt, whose first
sentences become the system message.
"""

from collections.abc import Mapping
from typing import Any

from input_pipeline.examples import Chat, RowError, show

_TASK = "Below is an instruction that describes a task"
_ANSWER = "Write a response that appropriately completes the request."


def matches(row: Mapping[str, Any]) -> bool:
    return "instruction" in row and "output" in row


def parse(row: Mapping[str, Any], *, system_prompt: bool = False) -> Chat:
    instruction, output = _string(row, "instruction"), _string(row, "output")
    context = _string(row, "input") if row.get("input") is not None else ""
    if not system_prompt:
        user = f"{instruction}\n\n{context}".strip()
        return Chat(messages=({"role": "user", "content": user}, {"role": "assistant", "content": output}))
    system = (
        f"{_TASK}, paired with an input that provides further context. {_ANSWER}" if context else f"{_TASK}. {_ANSWER}"
    )
    user = f"{instruction}\n\n### Input:\n{context}" if context else instruction
    return Chat(
        messages=(
            {"role": "system", "content": system},
            {"role": "user", "content": user},
            {"role": "assistant", "content": output},
        )
    )


def _string(row: Mapping[str, Any], field: str) -> str:
    if not isinstance(row.get(field), str):
        raise RowError(f"{field} must be a string, not {show(row.get(field))}")
    return row[field]
