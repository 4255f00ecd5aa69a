"""Puzzles and questions that are made up: always solvable, always right, the same for a seed, and split by split."""

import ast
import json
import pickle
import re
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline import known
from input_pipeline.catalog import Entry, open_dataset
from input_pipeline.countdown import countdown, puzzle
from input_pipeline.examples import Prompt
from input_pipeline.letter_count import WORDS, letter_count
from input_pipeline.prompts import read_prompts
from input_pipeline.reading import Reading

OPERATIONS = {
    ast.Add: Fraction.__add__,
    ast.Sub: Fraction.__sub__,
    ast.Mult: Fraction.__mul__,
    ast.Div: Fraction.__truediv__,
}


def value(node, used):
    """What an equation's side comes to, exactly; the numbers in it are added to `used`."""
    if isinstance(node, ast.Expression):
        return value(node.body, used)
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](value(node.left, used), value(node.right, used))
    assert isinstance(node, ast.Constant)
    used.append(node.value)
    return Fraction(node.value)


class TestCountdown:
    @settings(max_examples=300, deadline=None)
    @given(
        seed=st.integers(),
        fewest=st.integers(2, 4),
        more=st.integers(0, 2),
        highest=st.integers(9, 99),
        operations=st.sampled_from(["+", "+-", "+-*/", "*+"]),
        trained=st.booleans(),
    )
    def test_every_puzzle_is_solved_by_its_solution_with_each_number_once(
        self, seed, fewest, more, highest, operations, trained
    ):
        numbers = Random(seed)
        made = puzzle(
            numbers.randrange,
            counts=range(fewest, fewest + more + 1),
            highest=highest,
            targets=range(10, 101),
            operations=operations,
            trained=trained,
        )
        used: list[int] = []
        assert value(ast.parse(made.solution, mode="eval"), used) == made.target
        assert sorted(used) == sorted(made.numbers)
        assert 10 <= made.target <= 100
        assert fewest <= len(used) <= fewest + more
        assert all(1 <= number <= highest for number in used)
        assert set(re.sub(r"[\d() ]", "", made.solution)) <= set(operations)

    def test_a_row_is_the_documentations(self):
        dataset = open_dataset(Entry(dataset_name="countdown", dataset_kwargs={"size": 3}), trainer="VERL_GRPO")
        row, made = dataset.example(0), countdown(3)[0]
        assert len(dataset) == 3
        assert row == open_dataset(Entry(dataset_name="countdown"), trainer="TRL_GRPO").example(0)
        assert isinstance(row, Prompt)
        assert row.prompt[0]["content"] == known.countdown(made, split="train")["prompt"][0]["content"]
        assert row.columns == {
            "ability": "math",
            "data_source": "countdown",
            "extra_info": {"split": "train"},
            "reward_model": {"ground_truth": {"numbers": made["nums"], "target": made["target"]}, "style": "rule"},
        }

    def test_the_first_rows_stay_what_they_are(self):
        assert list(countdown(3)) == FIRST_PUZZLES

    def test_no_puzzle_of_one_split_is_in_the_other(self):
        def of(split):
            made = countdown(400, split=split, most_numbers=3, highest_number=12)
            return {(*sorted(row["nums"]), row["target"]) for row in made}

        assert not of("train") & of("test")

    def test_an_entrys_seed_and_split_are_the_sets(self):
        def of(**options):
            kwargs = {"size": 2, "most_numbers": 5}
            return open_dataset(
                Entry(dataset_name="countdown", dataset_kwargs=kwargs, **options), trainer="VERL_GRPO"
            ).rows[0]

        assert of() == of(seed=0) == of(split="train[:1]") == countdown(9, most_numbers=5)[0]
        assert of(seed=1) == countdown(2, seed=1, most_numbers=5)[0] != of()
        assert of(split="test") == countdown(2, split="test", most_numbers=5)[0] != of()

    @pytest.mark.parametrize(
        ("kwargs", "text"),
        [
            ({"size": 0}, "dataset_kwargs.size must be a whole number of at least 1, not 0"),
            ({"fewest_numbers": 1}, "dataset_kwargs.fewest_numbers must be a whole number of at least 2, not 1"),
            ({"most_numbers": 2}, "dataset_kwargs.most_numbers must be a whole number of at least 3, not 2"),
            ({"operations": "+^"}, "dataset_kwargs.operations must be some of '+-*/', not '+^'"),
            ({"highest_number": 2, "lowest_target": 1000, "highest_target": 1000}, "widen them in dataset_kwargs"),
            ({"sice": 5}, "dataset_kwargs.sice is unknown; did you mean 'size'"),
        ],
    )
    def test_what_cannot_be_made_is_told(self, kwargs, text):
        with pytest.raises(ValueError, match=re.escape(text)):
            open_dataset(Entry(dataset_name="countdown", dataset_kwargs=kwargs), trainer="VERL_GRPO")


class TestLetterCount:
    def test_a_row_is_the_documentations_and_its_number_right(self):
        dataset = open_dataset(Entry(dataset_name="letter_count"), trainer="TRL_GRPO")
        assert len(dataset) == 1000
        answers = []
        for index in range(len(dataset)):
            row = dataset.example(index)
            assert isinstance(row, Prompt)
            system, question = row.prompt
            assert (system["role"], question["role"]) == ("system", "user")
            assert "\\boxed{your_answer}" in system["content"]
            (word,) = re.findall(r"'([a-z]{2,})'", question["content"])
            (letter,) = re.findall(r"'([a-z])'", question["content"])
            assert row.columns == {"letter_count": word.count(letter)}
            answers.append(word.count(letter))
        assert set(answers) >= {0, 1, 2, 3}
        assert answers.count(0) < 150

    def test_the_first_rows_stay_what_they_are(self):
        assert [row["messages"][0]["content"] for row in letter_count(3)] == FIRST_QUESTIONS

    def test_words_are_as_long_as_asked_and_no_word_of_one_split_is_in_the_other(self):
        def of(split):
            rows = letter_count(2000, split=split, shortest_word=4, longest_word=5)
            return {re.findall(r"'([a-z]{2,})'", row["messages"][0]["content"])[0] for row in rows}

        train, test = of("train"), of("test")
        assert not train & test
        assert train | test == {word for word in WORDS if 4 <= len(word) <= 5}

    def test_lengths_that_no_word_has_are_an_error(self):
        with pytest.raises(ValueError, match="letter_count has no word of 40 to 41 letters for the split 'train'"):
            letter_count(shortest_word=40, longest_word=41)

    def test_the_words_are_words_and_each_stands_once(self):
        assert len(set(WORDS)) == len(WORDS)
        assert all(word.isascii() and word.isalpha() and word.islower() for word in WORDS)


@pytest.mark.parametrize("made", [countdown(1000), letter_count(1000)], ids=["countdown", "letter_count"])
def test_rows_are_drawn_each_by_itself(made):
    sent = pickle.loads(pickle.dumps(made))  # noqa: S301  # as to a worker process
    assert made[7] == made[7] == made[5:9][2] == made[1:][1:][5] == sent[7]
    assert len(made[998:2000]) == 2
    assert len(made[5:2]) == 0
    assert len({repr(row) for row in made}) > 800
    with pytest.raises(IndexError):
        made[1000]


@pytest.mark.parametrize(("name", "trainer"), [("countdown", "VERL_GRPO"), ("letter_count", "TRL_GRPO")])
def test_they_become_prompts_with_no_file(tokenizer, name, trainer):
    split = {"datasets": [{"dataset_name": name, "dataset_kwargs": {"size": 20}, "split": "train[5:15]"}]}
    prompts = read_prompts(split, tokenizer, reading=Reading(max_length=None, seed=1, trainer=trainer))
    assert len(prompts) == 10
    assert prompts[0].place.startswith("row 6 of input_pipeline.")


@pytest.mark.parametrize("name", ["countdown", "letter_count"])
def test_rows_of_a_file_in_the_documentations_form_go_by_the_name_too(tmp_path, name):
    trainer = {"countdown": "VERL_GRPO", "letter_count": "TRL_GRPO"}[name]
    row = {
        "countdown": known.countdown({"nums": [79, 8], "target": 87}, split="train"),
        "letter_count": {"prompt": [{"role": "user", "content": "How many?"}], "letter_count": 1},
    }[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    entry = Entry(dataset_name=name, dataset_path=str(tmp_path / "rows.jsonl"))
    example = open_dataset(entry, trainer=trainer).example(0)
    assert isinstance(example, Prompt)
    assert {"prompt": list(example.prompt), **example.columns} == row


FIRST_PUZZLES = [
    {"target": 62, "nums": [54, 6, 60, 62]},
    {"target": 26, "nums": [9, 2, 19]},
    {"target": 76, "nums": [21, 65, 10]},
]
FIRST_QUESTIONS = [
    "Look at the word 'buckwheat'. How many times is the letter 'c' used?",
    "Count the 'u's in the word 'bulgur'.",
    "Count the 'i's in the word 'independence'.",
]
