"""Did you mean: the name somebody probably meant to type."""

import difflib
from collections.abc import Iterable

PART = 2  # a part of a name ("sft" of "TRL_SFT"), or its beginning, counts as two slips


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name fewest slips from `word`: a letter left out, added, changed, or two swapped. None if none is close."""
    word = word.lower()
    most = min(max(2, len(word) // 3), len(word) - 1)
    distances = {name: _distance(word, name.lower(), most) for name in names}
    fewest = min(distances.values(), default=most + 1)
    if fewest > most:
        return None
    ties = [name for name, distance in distances.items() if distance == fewest]
    return max(ties, key=lambda name: difflib.SequenceMatcher(None, word, name.lower()).ratio())


def slips(one: str, other: str) -> int:
    """Damerau-Levenshtein distance (the restricted form: no letter is edited twice)."""
    before: list[int] = []
    last: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one):
        before, last, row = last, row, [i + 1]
        for j, b in enumerate(other):
            cost = min(last[j] + (a != b), last[j + 1] + 1, row[j] + 1)
            if i and j and a == other[j - 1] and one[i - 1] == b:
                cost = min(cost, before[j - 1] + 1)
            row.append(cost)
    return row[-1]


def _distance(word: str, name: str, most: int) -> int:
    """The slips between them, where they can be as few as `most`."""
    if len(word) > PART and (word in name.split("_") or name.startswith(word)):
        return min(PART, slips(word, name))
    return slips(word, name) if abs(len(word) - len(name)) <= most else most + 1
