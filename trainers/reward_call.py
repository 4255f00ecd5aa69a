"""How a reward function is called, and what it may return: TRL's form and verl's, told by the names of its arguments.

N answers. A call's failures are texts; a score that is not a finite number is a failure too, None is no opinion.
"""

import asyncio
import functools
import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trainers.rewards import text_of

Function = Callable[..., Any]
VERLS = ("data_source", "solution_str", "ground_truth", "extra_info")


class Scored(NamedTuple):
    """The score of the answer `place`, None where there is no opinion; or why there is none."""

    place: int
    score: float | None
    failure: str | None = None


def one_by_one(function: Function) -> bool:
    """Whether the function has verl's form, one answer at a time."""
    return "solution_str" in inspect.signature(function).parameters


def scores(
    function: Function, given: Mapping[str, Any], places: Sequence[int], settings: Mapping[str, Any]
) -> Iterator[Scored]:
    """The scores of the answers at `places`. `given` has lists [N] of `prompts`, `completions`, `completion_ids` and of
    the columns by name; `settings` are the function's own and go before columns.
    """
    if one_by_one(function):
        for place in places:
            yield from _judged(function, [place], functools.partial(_ask_verls, function, given, place, settings))
        return
    chosen = {name: [values[place] for place in places] for name, values in given.items()}
    yield from _judged(function, places, lambda: _ask_trls(function, chosen, settings))


def told(error: Exception, place: str | None = None) -> str:
    """An error in one line, with `place`, else with where it was raised."""
    if place is None:
        at = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{at.filename}:{at.lineno}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]} ({place})"


def _ask_trls(function: Function, given: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    wanted = inspect.signature(function).parameters.values()
    named = {one.name for one in wanted if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    all_of_them = any(one.kind is one.VAR_KEYWORD for one in wanted)
    offered = {**given, **settings}
    if missing := [one.name for one in wanted if one.name in named - offered.keys() and one.default is one.empty]:
        raise ValueError(f"needs {', '.join(missing)}, which the rows do not have; they have {', '.join(given)}")
    return _awaited(function(**{name: value for name, value in offered.items() if all_of_them or name in named}))


def _ask_verls(function: Function, given: Mapping[str, Any], place: int, settings: Mapping[str, Any]) -> list[Any]:
    def column(name: str) -> Any:
        return given[name][place] if name in given else None

    reward_model = column("reward_model")
    truth = column("ground_truth") if reward_model is None else reward_model["ground_truth"]
    if truth is None:
        raise ValueError("needs reward_model: {ground_truth: …} of the row, which it does not have")
    given_to_it = dict(zip(VERLS, (column("data_source"), text_of(given["completions"][place]), truth), strict=False))
    found = _awaited(function(**{**given_to_it, "extra_info": column("extra_info"), **settings}))
    return [found["score"] if isinstance(found, Mapping) else found]


def _awaited(found: Any) -> Any:
    async def waits() -> Any:
        return await found

    return asyncio.run(waits()) if inspect.isawaitable(found) else found


def _judged(function: Function, places: Sequence[int], ask: Callable[[], Any]) -> list[Scored]:
    """What a call returned for the answers at `places`."""
    try:
        found = ask()
        if hasattr(found, "tolist"):  # an array
            found = found.tolist()
        if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != len(places):
            came = f"{len(found)} scores" if isinstance(found, Sequence) else type(found).__name__
            raise ValueError(f"returned {came}; allowed: a list of {len(places)}, one score for each answer")
        return [_checked(function, place, score) for place, score in zip(places, found, strict=True)]
    except Exception as error:  # noqa: BLE001  # whatever a user's function raises is that function's failure
        why = told(error, _place(function, error))
        return [Scored(place, None, f"answer {place}: {why}" if one_by_one(function) else why) for place in places]


def _checked(function: Function, place: int, score: Any) -> Scored:
    if score is None:
        return Scored(place, None)
    if hasattr(score, "item"):  # a scalar of numpy
        score = score.item()
    if not isinstance(score, bool | int | float):
        came, allowed = type(score).__name__, "a number or None"
    elif not math.isfinite(score):
        came, allowed = str(score), "a finite number or None"
    else:
        return Scored(place, float(score))
    return Scored(place, None, f"returned {came} for answer {place}; allowed: {allowed} ({_place(function)})")


def _place(function: Function, error: Exception | None = None) -> str | None:
    """The last line of the function's own file that an error went through, else the function's first; None where it
    has no code of its own to point at.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return None
    frames = traceback.extract_tb(error.__traceback__) if error else []
    lines = [frame.lineno for frame in frames if frame.filename == code.co_filename]
    return f"{code.co_filename}:{lines[-1] if lines else code.co_firstlineno}"
