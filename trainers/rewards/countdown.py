"""The reward of puzzles in which an equation is made of given numbers. Nothing of an answer is ever executed: its text
is parsed, and the tree's few kinds of nodes are computed with exact fractions.
"""

import ast
import operator
import re
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

_OPENS, _CLOSES = "<answer>", "</answer>"
_ALLOWED = re.compile(r"[0-9+\-*/().\s]+")
_MOST_CHARACTERS, _MOST_DEPTH, _MOST_DIGITS = 200, 32, 12
_CLOSE = Fraction(1, 100_000)
_OPERATIONS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def countdown(
    data_source: Any,
    solution_str: str,
    ground_truth: Mapping[str, Any],
    extra_info: Any = None,
    format_score: float = 0.0,
    score: float = 1.0,
) -> float:
    """`score` where the last `<answer>…</answer>` of the answer's last line is an expression of all of
    `ground_truth`'s `numbers`, each once, whose value is its `target`; `format_score` where it is another one, 0
    without such an answer (Oumi's).
    """
    text = _last_answer(solution_str.rpartition("\n")[2])
    if text is None:
        return 0.0
    value = value_of(text, [int(number) for number in ground_truth["numbers"]])
    return score if value is not None and abs(value - int(ground_truth["target"])) < _CLOSE else format_score


def _last_answer(line: str) -> str | None:
    """What stands in the last pair of tags; found in one pass, where a regular expression begins anew at every tag."""
    text, start = None, line.find(_OPENS)
    while start >= 0 and (end := line.find(_CLOSES, start)) >= 0:
        text, start = line[start + len(_OPENS) : end], line.find(_OPENS, end)
    return text


def value_of(text: str, numbers: list[int]) -> Fraction | None:
    """The value of an expression of just these numbers with + - * / and brackets; None for all else."""
    text = text.strip()
    if len(text) > _MOST_CHARACTERS or not _ALLOWED.fullmatch(text):
        return None
    used = re.findall(r"[0-9]+", text)
    if any(len(each) > _MOST_DIGITS for each in used) or Counter(map(int, used)) != Counter(numbers):
        return None
    try:
        return _computed(ast.parse(text, mode="eval").body, 0)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _computed(node: ast.expr, depth: int) -> Fraction:
    if depth > _MOST_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_computed(node.operand, depth + 1)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_computed(node.left, depth + 1), _computed(node.right, depth + 1))
    raise ValueError(f"{type(node).__name__} is no part of an equation")
