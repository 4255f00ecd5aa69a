"""The loop stays one step ahead of the device: between two steps the host does not wait for the later one's results."""

import dataclasses

from benchmarks.dispatch import Call, run_of, waits_of_a_step, watched
from trainers.loop import train

SLOW = {"width": 64, "tokens": 128}  # a step takes the device far longer than the host takes to start the next one


def test_a_step_is_started_while_the_one_before_is_on_the_device_and_only_a_log_line_waits(tmp_path):
    calls: list[Call] = []
    with run_of(tmp_path, **SLOW, steps=16, log_steps=5) as (run, state):
        train(dataclasses.replace(run, step=watched(run.step, calls)), state)
    done = {number for number, call in enumerate(calls, start=1) if call.before_done and number > 2}  # 1 compiles
    assert {6, 11, 16} <= done
    assert len(done) <= 4  # a busy machine may stop the host for as long as a step, once


def test_of_a_step_one_number_is_fetched_whether_the_step_before_diverged(tmp_path):
    assert waits_of_a_step(tmp_path, **SLOW, steps=10) == 1.0
