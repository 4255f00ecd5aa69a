"""The reward of a mathematical answer that equals the known one, by the package math-verify."""

from typing import Any

try:
    from math_verify import LatexExtractionConfig, parse, verify
except ImportError:
    raise ValueError(
        "training.reward_functions: math_verify needs the package math-verify: pip install 'einkorn[math]'"
    ) from None

_SECONDS = 1  # for an answer to be read, and as many to be compared; the package's own bound is 5


def math_verify(data_source: Any, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """1 where the answer's LaTeX ($…$, \\boxed{…}) equals `ground_truth`'s, else 0, or where none can be told in time.

    Only LaTeX is looked at, as in TRL's accuracy_reward: the package reads it with a grammar, but gives plain
    expressions such as 9**9 to sympy's parse_expr, which executes them.
    """
    latex = [LatexExtractionConfig()]
    known, found = (
        parse(text, extraction_config=latex, parsing_timeout=_SECONDS) for text in (f"${ground_truth}$", solution_str)
    )
    return float(verify(known, found, timeout_seconds=_SECONDS))
