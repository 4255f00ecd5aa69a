"""Reward functions of a user, as tests name them: tests/trainers/own_rewards.py:function."""

import json
import os
import signal
import time


def words(completions, **_):
    return [len(text.split()) for text in completions]


def wanted_column(completions, wanted):
    return [float(text == word) for text, word in zip(completions, wanted, strict=True)]


def of_one(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    return {"score": float(solution_str == ground_truth) + bonus, "seen": data_source}


async def asynchronous(completions, **_):
    return [1.0 for _ in completions]


async def asynchronous_of_one(data_source, solution_str, ground_truth, extra_info=None):
    return 0.5


def no_opinion(completions, **_):
    return [None if text == "?" else 1.0 for text in completions]


def raises(completions, **_):
    raise KeyError("no such answer")


def fails_in_a_library(completions, **_):
    return json.loads("{")


def holds_the_interpreter(completions, **_):
    return [9**9**9]  # in C: no other thread runs meanwhile


def asks_to_be_ended(completions, **_):
    for asked in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), asked)
    return [1.0 for _ in completions]


def hangs(completions, **_):
    while True:
        time.sleep(0.01)


def hangs_at_one(data_source, solution_str, ground_truth, extra_info=None):
    while solution_str == "hang":
        time.sleep(0.01)
    return 1.0


def ends(completions, **_):
    os._exit(9)


def too_few(completions, **_):
    return [1.0]


def not_a_number(data_source, solution_str, ground_truth, extra_info=None):
    return float("nan") if solution_str == "nan" else 0.5


def a_word(completions, **_):
    return ["good" for _ in completions]


def prints(completions, **_):
    print("[0, 99.0, null]")
    return [0.25 for _ in completions]
