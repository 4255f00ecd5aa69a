"""The reward of grade-school mathematics with a number as its answer."""

import re
from typing import Any, Literal

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[0-9.,]+")


def gsm8k(
    data_source: Any,
    solution_str: str,
    ground_truth: str,
    extra_info: Any = None,
    method: Literal["strict", "flexible"] = "strict",
    format_score: float = 0.0,
    score: float = 1.0,
) -> float:
    """`score` where the answer's number is `ground_truth`, letter by letter without commas; `format_score` where it is
    another one, 0 without one (Oumi's). "strict": the number after the last `####`; "flexible": the last number.
    """
    if method not in ("strict", "flexible"):
        raise ValueError(f"gsm8k: method is {method!r}; allowed: strict, flexible")
    if method == "strict":
        found = _STRICT.findall(solution_str)
    else:
        found = [number for number in _NUMBER.findall(solution_str) if any(map(str.isdigit, number))]
    if not found:
        return 0.0
    return score if found[-1].replace(",", "") == str(ground_truth) else format_score
