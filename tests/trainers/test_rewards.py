"""Reward functions give Oumi's scores, and nothing of an answer is executed."""

import pkgutil
import random
import sys
import time
from fractions import Fraction
from pathlib import Path

import math_verify.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

import trainers.rewards
from input_pipeline import known
from input_pipeline.countdown import puzzle
from input_pipeline.letter_count import letter_count
from trainers.rewards import REWARDS, reward_function, text_of
from trainers.rewards.countdown import value_of


def scores(name, *texts, **columns):
    return reward_function(name)(completions=list(texts), **columns)


@pytest.mark.parametrize("name", REWARDS)
def test_every_name_is_a_function_of_a_file_here(name):
    assert callable(reward_function(name))
    assert callable(reward_function(name.upper()))


def test_every_file_here_has_a_name():
    files = {one.name for one in pkgutil.iter_modules(trainers.rewards.__path__)}
    assert files == {place.partition(":")[0].rpartition(".")[2] for place in REWARDS.values()}


def test_another_name_is_answered_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"'soft' is not known; there are count_letters, countdown, .*file.py:function"
    ):
        reward_function("soft")


def test_closeness_to_a_number_of_words():
    # x e^(1 - x) with x = words / 20; a text of no words counts as one, a space at its end as one more
    assert scores("soft_20tokens_completions", "a " * 19 + "a", "", "a ") == pytest.approx(
        [1, 0.129286, 0.245960], rel=1e-5
    )
    assert scores("soft_5tokens_completions", "a b c d e", "a") == pytest.approx([1, 0.2 * 2.718281828**0.8])
    assert scores("sharp_10tokens_completions", "", "a " * 18 + "a") == [-9, -9]
    assert scores("sharp_20tokens_completions", "a b") == [-18]


def test_answers_that_are_messages_are_read_as_their_last_text():
    assert text_of([{"role": "assistant", "content": "a b"}]) == "a b"
    assert scores("sharp_5tokens_completions", [{"role": "assistant", "content": "a b"}]) == [-3]


def test_answers_beyond_a_length_cost_up_to_one():
    ids = [[0] * n for n in (5, 8, 9, 10, 12, 30)]
    found = reward_function("overlong")(completion_ids=ids, max_length=12, cache_length=4)
    assert found == [0, 0, -0.25, -0.5, -1, -1]


@pytest.mark.parametrize(
    ("text", "count", "score"),
    [
        ("foo bar 1", 1, -3),
        (r"\boxed{1}", 1, 0),
        (r"\boxed{+1}", 1, 0),
        (r"\boxed{4}", 1, 1 / 3.5 - 2),
        (r"\boxed{-1}", 1, -1.6),
        (r"\boxed{1} \boxed{1}", 1, -3),
        (r"\boxed{one}", 1, -3),
        (r"\boxed{10}", 3, 1 / 7.5 - 2),
        (r"\boxed{" + "9" * 5000 + "}", 3, -2),
    ],
)
def test_a_count_of_letters_in_a_box(text, count, score):
    assert scores("count_letters", text, letter_count=[count]) == pytest.approx([score])


def solved(text, numbers, target, **kwargs):
    truth = {"numbers": numbers, "target": target}
    return reward_function("countdown")("countdown", text, truth, None, **kwargs)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<answer>(3-2)*1</answer>", 1),
        ("so\n<answer>9</answer> no, <answer>3 - 2*1</answer>", 1),
        ("<answer>3-1*2</answer>", 1),
        ("<answer>1+2+3</answer>", 0),  # another value
        ("<answer>1.0 * 2.0 * 3.0</answer>", 0),
        ("<answer>3-2</answer>", 0),  # not all numbers
        ("<answer></answer>", 0),
        ("(3-2)*1", 0),
        ("<answer>(3-2)*1</answer>\n", 0),  # not in the last line
        ("<answer>3/(2-2*1)</answer>", 0),
        ("<answer>no<answer>3-2*1</answer>", 0),  # from the first tag on
        ("<answer>3-2*1</answer><answer>", 1),
    ],
)
def test_a_puzzle_is_solved_by_an_expression_of_all_its_numbers(text, score):
    assert solved(text, [1, 2, 3], 1) == score


def test_a_wrong_expression_may_have_a_score_of_its_own():
    assert solved("<answer>1</answer>", [1, 2], 3, format_score=0.1) == 0.1
    assert solved("1", [1, 2], 3, format_score=0.1) == 0


@given(st.integers(0, 10_000))
def test_puzzles_made_here_are_solved_by_their_solutions(seed):
    draw = random.Random(seed).randrange
    made = puzzle(draw, counts=range(3, 5), highest=99, targets=range(10, 101), operations="+-*/", trained=True)
    assert solved(f"<answer>{made.solution}</answer>", made.numbers, made.target) == 1


def test_values_are_exact():
    assert value_of("1/3+1/3+1/3", [1, 3, 1, 3, 1, 3]) == 1
    assert value_of("-(2-7)/10", [2, 7, 10]) == Fraction(1, 2)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so #### 72", 1, 1),
        ("#### 72.", 0, 0),
        ("#### 7 #### 72", 1, 1),
        ("#### 72" + "." + " words" * 100, 0, 0),
        ("#### 72" + " words" * 100, 1, 1),
        ("####72", 0, 1),
        ("#### $72", 0, 1),
        ("it is 72", 0, 1),
        ("72 or 73", 0, 0),
        ("", 0, 0),
    ],
)
def test_the_number_of_an_answer(text, strict, flexible):
    assert reward_function("gsm8k")("gsm8k", text, "72") == strict
    assert reward_function("gsm8k")("gsm8k", text, "72", method="flexible") == flexible


def test_commas_of_a_number_do_not_matter():
    assert reward_function("gsm8k")("gsm8k", "#### 1,234", "1234") == 1


def test_forms_of_a_text():
    assert scores("json_valid", '{"a": 1}', "```json\n[1]\n```", "{", "", "NaN") == [1, 1, 0, 0, 0]
    assert scores("json_valid", "[" * 100_000) == [0]
    assert scores("regex", "so: 12", "so", pattern=r"\d+") == [1, 0]
    assert scores("regex", "so: 12", "12", pattern=r"\d+", full=True) == [0, 1]


def hostile() -> list[str]:
    """A thousand answers that are meant to hang, to crash or to be executed."""
    canary = "__import__('pathlib').Path('canary').touch()"
    fixed = [
        *(canary, f"eval({canary!r})", "9**9**9**9", "79**44**19", "(" * 2000 + "1" + ")" * 2000, "-" * 5000 + "1"),
        *(
            "1e999",
            "0/0",
            "1/0",
            "lambda: 0",
            "１+２",
            "٣",
            "1\x00",
            "\ud800",
            "9" * 100_000,
            "1 if 1 else 2",
            "a" * 1_000_000,
            "<answer>" * 125_000,
            "\\boxed{1" * 125_000,
            "```json\n" + "\n```" * 200_000,
            " " * 1_000_000 + "#",
        ),
        *(
            "(1+2",
            "1+2)",
            "1_0",
            "0x1",
            "1j",
            "'a'*3",
            "[1]*3",
            "f'{1}'",
            "1;2",
            "1\n+2",
            "*" * 1000,
            "1//1",
            "~1",
            "1@2",
        ),
    ]
    draw = random.Random(0)
    letters = "0123456789+-*/(). \t#\\{}<>answerbox_'\"\x00٣\ud800"
    return fixed + ["".join(draw.choices(letters, k=draw.randrange(1, 300))) for _ in range(1000 - len(fixed))]


def test_hostile_answers_are_scored_at_once_and_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    for text in hostile():
        for around in ("{}", "<answer>{}</answer>", r"\boxed{{{}}}", "#### {}"):
            answer = around.format(text)
            assert solved(answer, [1, 2, 3], 7) in (0, 1)
            assert reward_function("gsm8k")("gsm8k", answer, "72") in (0, 1)
            assert scores("count_letters", answer, letter_count=[2])[0] <= 0
            assert scores("json_valid", answer)[0] in (0, 1)
            assert scores("soft_20tokens_completions", answer)[0] >= 0
    assert time.monotonic() - began < 60
    assert not list(Path(tmp_path).iterdir())


def test_rows_made_here_are_scored_by_their_columns():
    row = known.letter_count(letter_count(4)[2])
    assert scores("count_letters", f"\\boxed{{{row['letter_count']}}}", letter_count=[row["letter_count"]]) == [0]
    row = known.gsm8k({"question": "How many?", "answer": "So 1,000 + 234.\n#### 1,234"}, split="train")
    assert reward_function("gsm8k")("openai/gsm8k", "#### 1,234", row["reward_model"]["ground_truth"]) == 1


def test_the_package_for_mathematics_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.delitem(sys.modules, "trainers.rewards.mathematics", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'einkorn\[math\]'"):
        reward_function("math_verify")


@pytest.mark.parametrize(
    ("text", "score"), [(r"$\frac{1}{2}$", 1), (r"so \boxed{0.5}", 1), (r"\boxed{2}", 0), ("0.25*2", 0), ("9**9**9", 0)]
)
def test_a_mathematical_answer_is_read_as_latex_alone(text, score, monkeypatch):
    executed = []  # sympy's parse_expr executes what it is given
    monkeypatch.setattr(math_verify.parser, "parse_expr", lambda given, **_: executed.append(given))
    assert reward_function("math_verify")("math", text, "0.5") == score
    assert not executed
