"""Profiles hold the steps that were asked for and no others; the schedule is torch's."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from torch.profiler import ProfilerAction
from torch.profiler import schedule as torch_schedule

from trainers.profiler import Profiler, When

SCHEDULES = [
    When(),
    When(skip_first=0, wait=0, warmup=0, active=1, repeat=1),
    When(skip_first=2, wait=3, warmup=1, active=2, repeat=2),
    When(skip_first=0, wait=1, warmup=0, active=3, repeat=0),
]


@jax.jit
def train(state: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    for _ in range(20):
        state = jnp.sin(state @ state)
    return state, {"loss": state.sum()}


def profiled(folder: Path, when: When, *, steps: int, done_steps: int = 0) -> list[str]:
    """What a run of so many steps says."""
    said: list[str] = []
    state = jnp.ones((64, 64))
    with Profiler(folder, when, done_steps=done_steps, host=True, say=said.append) as profiler:
        step = profiler.around(train)
        for _ in range(steps):
            state, _ = step(state)
    return said


def events(line: str) -> list[dict]:
    """The complete events of the file that a line names."""
    with gzip.open(line.removeprefix("profile for ui.perfetto.dev: ")) as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def steps_of(line: str) -> list[int]:
    return [int(event["args"]["step_num"]) for event in events(line) if event["name"] == "train"]


def test_without_a_schedule_it_is_the_third_to_the_fifth_step():
    assert [count for count in range(1, 20) if When().place(count) is not None] == [3, 4, 5]


def test_two_cycles_by_hand():
    when = When(skip_first=2, wait=3, warmup=1, active=2, repeat=2)
    # 1 2 skipped, 3 4 5 waited, 6 warm, 7 8 profiled; 9 10 11, 12, 13 14; and no more.
    assert {count: when.place(count) for count in range(1, 40) if when.place(count) is not None} == {
        7: 0,
        8: 1,
        13: 0,
        14: 1,
    }


@pytest.mark.filterwarnings("ignore:Profiler won.t be using warmup")  # torch's word
@pytest.mark.parametrize("when", SCHEDULES)
def test_the_schedule_is_torchs(when):
    theirs = torch_schedule(**when._asdict(), skip_first_wait=0)
    recorded = {ProfilerAction.RECORD: 0, ProfilerAction.RECORD_AND_SAVE: 1}
    for count in range(1, 40):
        place, action = when.place(count), theirs(count - 1)  # torch counts from 0
        assert (place is not None) == (action in recorded)
        assert (place == when.active - 1) == (action == ProfilerAction.RECORD_AND_SAVE)


def test_a_profile_has_the_steps_asked_for_whole_and_no_others(tmp_path):
    (line,) = profiled(tmp_path, When(), steps=8, done_steps=100)
    assert f"{tmp_path}/steps-103-105/plugins/profile/" in line
    assert steps_of(line) == [103, 104, 105]
    executed = [event for event in events(line) if event["name"].startswith("ThunkExecutor::Execute")]
    assert len(executed) == 3  # of those before none, of those after none, and the last to its end


def test_every_cycle_has_a_file_of_its_own(tmp_path):
    lines = profiled(tmp_path, When(skip_first=0, wait=1, warmup=0, active=2, repeat=0), steps=7)
    assert [steps_of(line) for line in lines] == [[2, 3], [5, 6]]


def test_a_run_that_ends_in_the_midst_of_a_profile_keeps_what_there_is(tmp_path):
    (line,) = profiled(tmp_path, When(), steps=4)
    assert steps_of(line) == [3, 4]


def test_a_run_too_short_for_its_schedule_says_so(tmp_path):
    assert profiled(tmp_path, When(), steps=2) == [
        "nothing was profiled: of 2 steps none is one of training.profiler.schedule"
    ]
    assert list(tmp_path.iterdir()) == []


def test_an_error_ends_the_profile_and_another_can_begin(tmp_path):
    said: list[str] = []
    with Profiler(tmp_path, When(0, 0, 0, 9), done_steps=0, host=True, say=said.append) as profiler:
        step = profiler.around(train)
        step(jnp.ones((8, 8)))
        with pytest.raises(TypeError):
            step(jnp.ones((8, 9)))
    assert len(said) == 1
    (line,) = profiled(tmp_path, When(), steps=5)
    assert steps_of(line) == [3, 4, 5]
