"""`{"instruction": "…", "input": "…", "output": "…"}`, the fields of the Alpaca data.

Without a system prompt the user's turn is instruction, blank line, input. With `system_prompt=True` (how the data
sets tatsu-lab/alpaca and yahma/alpaca-cleaned are read) it is laid out as in the original prompt, whose first
sentences become the system message.
"""

from collections.abc import Mapping
from typing import Any

from input_pipeline import fields
from input_pipeline.examples import Chat, RowError

_TASK = "Below is an instruction that describes a task"
_ANSWER = "Write a response that appropriately completes the request."


def matches(row: Mapping[str, Any]) -> bool:
    return "instruction" in row and "output" in row


def parse(row: Mapping[str, Any], *, system_prompt: bool = False, empty_answers: bool = False) -> Chat:
    """`empty_answers`: rows without an answer are trained on too; tatsu-lab/alpaca has 28 of them."""
    instruction, output = fields.text(row.get("instruction"), "instruction"), fields.text(row.get("output"), "output")
    context = fields.text(row["input"], "input") if row.get("input") is not None else ""
    if not output and not empty_answers:
        raise RowError("output is empty", "empty")
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
