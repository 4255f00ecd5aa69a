"""Reward functions in processes of their own: both forms, every way to fail, and that nobody outlives the run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from trainers.reward_workers import RewardFunctions

ROOT = Path(__file__).resolve().parents[2]
OWN = f"{ROOT}/tests/trainers/own_rewards.py"
IDS = [[1, 2]] * 3


@pytest.fixture
def opened():
    """Reward functions, closed at the end."""
    held = []

    def of(*names, timeout=20.0, workers=1, **kwargs):
        specs = [f"{OWN}:{name}" for name in names]
        given = {f"{OWN}:{name}": settings for name, settings in kwargs.items()}
        held.append(RewardFunctions(specs, kwargs=given, timeout=timeout, workers=workers).__enter__())
        return held[-1]

    yield of
    for each in held:
        each.close()


def score(functions, *texts, **columns):
    return functions.score(["p"] * len(texts), list(texts), [[1, 2]] * len(texts), columns)


def test_both_forms_are_called_with_what_they_ask_for(opened):
    functions = opened("words", "wanted_column", "of_one", "asynchronous", "asynchronous_of_one", of_one={"bonus": 0.5})
    columns = {"wanted": ["a", "x", "b"], "reward_model": [{"ground_truth": "a"}] * 3, "data_source": ["s"] * 3}
    found = score(functions, "a", "a b", "b", **columns)
    assert functions.names == ("words", "wanted_column", "of_one", "asynchronous", "asynchronous_of_one")
    assert found.tolist() == [[1, 1, 1.5, 1, 0.5], [2, 0, 0.5, 1, 0.5], [1, 1, 0.5, 1, 0.5]]


def test_what_a_function_prints_and_signals_to_the_run_disturb_nothing(opened):
    assert score(opened("prints", "asks_to_be_ended"), "a", "b").tolist() == [[0.25, 1], [0.25, 1]]


def test_functions_of_one_name_are_told_apart_by_their_files():
    functions = RewardFunctions(["a.py:f", "a.py:g", "b.py:f"], kwargs={}, timeout=1.0, workers=1)
    assert functions.names == ("a.py:f", "g", "b.py:f")


def test_no_opinion_is_not_a_number_and_no_failure(opened):
    functions = opened("no_opinion")
    np.testing.assert_array_equal(score(functions, "a", "?"), [[1.0], [np.nan]])
    assert functions.failures == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"raises failed for 2 of 2 answers: KeyError: 'no such answer' \(.*own_rewards.py:\d+\)"),
        ("fails_in_a_library", r"JSONDecodeError: .* \(.*own_rewards.py:\d+\)"),
        ("too_few", r"returned 1 scores; allowed: a list of 2, .*own_rewards.py:\d+\)"),
        ("a_word", r"returned str for answer 0; allowed: a number or None \(.*own_rewards.py:\d+\)"),
        ("ends", "its process ended with code 9"),
        ("wanted_column", "needs wanted, which the rows do not have; they have prompts, completions, completion_ids"),
        ("of_one", "answer 0: ValueError: needs reward_model"),
    ],
)
def test_a_function_that_fails_for_most_answers_ends_the_run_with_its_name_and_place(opened, name, message):
    with pytest.raises(ValueError, match=message):
        score(opened(name), "a", "b")


def test_a_failure_among_many_answers_costs_its_score_alone(opened, caplog):
    functions = opened("not_a_number", workers=2)
    truth = {"reward_model": [{"ground_truth": "a"}] * 6}
    found = score(functions, "a", "b", "nan", "c", "d", "e", **truth)
    assert np.isnan(found[:, 0]).tolist() == [False, False, True, False, False, False]
    assert functions.failures == 1
    assert "1 of 6 answers: returned nan for answer 2" in caplog.text


def test_a_function_that_hangs_is_killed_at_the_deadline_and_the_next_call_works(opened):
    functions = opened("hangs_at_one", timeout=1.5)
    truth = {"reward_model": [{"ground_truth": "a"}] * 6}
    began = time.monotonic()
    found = score(functions, "a", "b", "c", "d", "e", "hang", **truth)
    assert time.monotonic() - began < 6
    assert np.isnan(found[:, 0]).tolist() == [False] * 5 + [True]
    assert score(functions, "a", "b", **truth).tolist() == [[1.0], [1.0]]


def test_a_function_that_hangs_takes_no_time_of_the_next(opened):
    functions = opened("hangs_at_one", "words", timeout=1.0)
    found = score(functions, "a", "b", "c", "d", "e", "hang", reward_model=[{"ground_truth": "a"}] * 6)
    np.testing.assert_array_equal(found, [[1, 1]] * 5 + [[np.nan, 1]])


def test_all_answers_of_a_function_that_hangs_are_lost_and_the_key_is_named(opened):
    with pytest.raises(ValueError, match=r"no score within 1 s \(training.reward_timeout\)"):
        score(opened("hangs", timeout=1.0), "a", "b")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "'nothing' is not known; there are count_letters"),
        (f"{OWN}:nothing", "has no function 'nothing'"),
        ("nowhere.py:f", "does not exist"),
    ],
)
def test_a_function_that_cannot_be_had_is_told_before_anything_runs(spec, message):
    with (
        pytest.raises(ValueError, match=message),
        RewardFunctions([spec], kwargs={}, timeout=5, workers=1),
    ):
        pass


def test_a_file_that_cannot_be_read_is_told_with_its_function_and_line(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("limit = nothing\n")
    with (
        pytest.raises(ValueError, match=r"training.reward_functions '.*own.py:f': NameError: .* \(.*own.py:1\)"),
        RewardFunctions([f"{own}:f"], kwargs={}, timeout=5, workers=1),
    ):
        pass


def test_a_process_brings_in_nothing_heavy():
    code = "import sys, trainers.reward_worker; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "torch", "transformers"} & set(loaded.stdout.split())


def test_hostile_texts_reach_a_function_and_come_back_as_scores(opened):
    functions = opened("words")
    texts = ["\ud800", "a\x00b", '"]\n[0, 1, null]\nnull\n', "x" * 1_000_000, ""]
    assert score(functions, *texts)[:, 0].tolist() == [1, 1, 5, 1, 0]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("name", ["hangs", "holds_the_interpreter"])
def test_no_process_outlives_one_who_is_killed(name):
    code = (
        "import sys, time, threading\n"
        "from trainers.reward_workers import RewardFunctions\n"
        f"r = RewardFunctions(['{OWN}:{name}'], kwargs={{}}, timeout=60, workers=2).__enter__()\n"
        "threading.Thread(target=r.score, args=([''], ['a'], [[1]], {}), daemon=True).start()\n"
        "time.sleep(0.5)\n"
        "print(*[w._process.pid for w in list(r._workers.queue)], flush=True)\n"
        "time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    idle = [int(word) for word in run.stdout.readline().split()]
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    workers = {*idle, *map(int, children)}
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    until = time.monotonic() + 10
    while any(_runs(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert workers
    assert not [pid for pid in workers if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
