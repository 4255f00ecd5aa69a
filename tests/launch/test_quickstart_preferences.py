"""The preference quickstart's data: pairs of the model's own answers, the brief one preferred, and what brief means."""

import json
from pathlib import Path
from typing import Any

import pytest

from input_pipeline.examples import Preference
from input_pipeline.formats import preference
from launch import quickstart
from launch.brief_answers import MOST_WORDS, THINGS, Pair, goes_in_circles, is_brief, questions

QUICKSTART = Path(__file__).resolve().parents[2] / "configs/quickstart"
SPLITS = ("train", "heldout")


def read(split: str) -> list[dict[str, Any]]:
    lines = (QUICKSTART / f"preferences_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def pairs(split: str) -> list[Pair]:
    return [Pair(*(row[side][0]["content"] for side in ("prompt", "chosen", "rejected"))) for row in read(split)]


@pytest.mark.parametrize(
    ("answer", "brief"),
    [
        ("A boat carries people across water.", True),
        (" ".join(["grain"] * MOST_WORDS) + ".", True),
        (" ".join(["grain"] * (MOST_WORDS + 1)) + ".", False),
        ("A boat carries people.\n\nIt is made of wood.", False),
        ("A boat carries people across", False),
        ("A boat.", False),
        ("", False),
    ],
)
def test_brief_is_one_paragraph_of_whole_sentences_with_at_most_forty_words(answer: str, brief: bool) -> None:
    assert is_brief(answer) == brief


def test_an_answer_goes_in_circles_when_most_of_it_has_been_said() -> None:
    assert goes_in_circles("A ring is a ring made of a ring that is made of a ring.")
    assert not goes_in_circles("A boat is a large vessel that carries people across the ocean.")


def test_every_pair_is_a_question_with_a_brief_answer_preferred_to_a_long_one() -> None:
    for split, rows in (("train", 48), ("heldout", 32)):
        assert len(read(split)) == rows
        for pair, row in zip(pairs(split), read(split), strict=True):
            assert pair.row() == row
            assert isinstance(preference.parse(row), Preference)
            assert is_brief(pair.chosen)
            assert not goes_in_circles(pair.chosen)
            assert len(pair.rejected.split()) > MOST_WORDS


def test_questions_are_those_of_the_seed_and_no_thing_is_asked_for_twice() -> None:
    asked = [pair.prompt for split in SPLITS for pair in pairs(split)]
    assert len(questions()) == len(set(THINGS))
    assert set(asked) <= set(questions())
    assert len(asked) == len(set(asked))


def test_the_quickstart_asks_what_is_held_out_and_knows_its_tasks_by_name() -> None:
    task, options = quickstart.chosen(["dpo", "--training.max_steps", "5"])
    assert options == ["--training.max_steps", "5"]
    assert quickstart.chosen(options) == (quickstart.TASKS["sft"], options)
    with pytest.raises(SystemExit, match=r"quickstart: 'kto' is no task; allowed: sft, dpo"):
        quickstart.chosen(["kto"])
    rows = quickstart.read_rows(QUICKSTART / "preferences_heldout.jsonl")
    assert [(row.prompt[0]["content"], row.expected) for row in rows] == [pair[:2] for pair in pairs("heldout")]
    assert quickstart.share_right(task, [pair.chosen for pair in pairs("heldout")], rows) == 1
    assert quickstart.share_right(task, [pair.rejected for pair in pairs("heldout")], rows) == 0
