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
            ask = functools.partial(_ask_verls, function, given, place, settings)
            (found,) = _judged(place, lambda ask=ask: [ask()], 1)  # type: ignore[misc]
            yield found
        return
    chosen = {name: [values[place] for place in places] for name, values in given.items()}
    for index, found in enumerate(_judged(0, lambda: _ask_trls(function, chosen, settings), len(places))):
        yield found._replace(place=places[index])


def _ask_trls(function: Function, given: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    wanted = inspect.signature(function).parameters.values()
    named = {one.name for one in wanted if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    all_of_them = any(one.kind is one.VAR_KEYWORD for one in wanted)
    offered = {**given, **settings}
    if missing := [one.name for one in wanted if one.name in named - offered.keys() and one.default is one.empty]:
        raise ValueError(f"needs {', '.join(missing)}, which the rows do not have; they have {', '.join(given)}")
    return function(**{name: value for name, value in offered.items() if all_of_them or name in named})


def _ask_verls(function: Function, given: Mapping[str, Any], place: int, settings: Mapping[str, Any]) -> Any:
    def column(name: str) -> Any:
        return given[name][place] if name in given else None

    reward_model = column("reward_model")
    truth = column("ground_truth") if reward_model is None else reward_model["ground_truth"]
    if truth is None:
        raise ValueError("needs reward_model: {ground_truth: …} of the row, which it does not have")
    given_to_it = dict(zip(VERLS, (column("data_source"), text_of(given["completions"][place]), truth), strict=False))
    found = function(**{**given_to_it, "extra_info": column("extra_info"), **settings})
    return found["score"] if isinstance(found, Mapping) else found


def _judged(first: int, ask: Callable[[], Any], count: int) -> list[Scored]:
    """What a call returned, answer by answer."""
    try:
        found = ask()
        if inspect.isawaitable(found):
            found = asyncio.run(_awaited(found))
        if hasattr(found, "tolist"):  # an array
            found = found.tolist()
        if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != count:
            came = f"{len(found)} scores" if isinstance(found, Sequence) else type(found).__name__
            raise ValueError(f"returned {came}; allowed: a list of {count}, one score for each answer")
        return [_checked(first + index, score) for index, score in enumerate(found)]
    except Exception as error:  # noqa: BLE001  # whatever a user's function raises is that function's failure
        return [Scored(first + index, None, _told(error)) for index in range(count)]


async def _awaited(found: Any) -> Any:
    return await found


def _checked(place: int, score: Any) -> Scored:
    if score is None:
        return Scored(place, None)
    if hasattr(score, "item"):  # a scalar of numpy
        score = score.item()
    if not isinstance(score, bool | int | float):
        return Scored(place, None, f"returned {type(score).__name__} for answer {place}; allowed: a number or None")
    if not math.isfinite(score):
        return Scored(place, None, f"returned {score} for answer {place}; allowed: a finite number or None")
    return Scored(place, float(score))


def _told(error: Exception) -> str:
    """An error in one line, with the last place of the user's code."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]} ({at.filename}:{at.lineno})"
