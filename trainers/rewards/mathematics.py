"""The reward of a mathematical answer that equals the known one, by the package math-verify."""

from typing import Any


def math_verify(data_source: Any, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """1 where the answer's expression equals `ground_truth`'s, else 0; ValueError where the package is missing.

    The package bounds its own time by a signal only, and reads LaTeX with a parser of its own; the worker's deadline
    bounds it in any case.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ValueError("math_verify needs the package math-verify: pip install 'einkorn[math]'") from None
    return float(verify(parse(f"${ground_truth}$"), parse(solution_str)))
