"""Every schedule against transformers' own, over whole runs and past their end, in Python and traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import get_scheduler

from configs.default import SCHEMA
from trainers.schedules import SCHEDULES, schedule, warmup

PEAK = 3e-4
OPTIONS = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.25}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_restarts", {"num_cycles": 7}),
    ("cosine_with_min_lr", {"min_lr": 3e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.2, "num_cycles": 0.75}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5, "warmup_lr_rate": 0.05}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.0}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 50}),
    ("warmup_stable_decay", {"num_decay_steps": 9}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "decay_type": "linear", "min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "decay_type": "1-sqrt", "warmup_type": "1-sqrt"}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "warmup_type": "cosine", "min_lr_ratio": 0.05}),
    ("warmup_stable_decay", {"num_decay_steps": 6, "num_stable_steps": 10, "num_cycles": 1.5}),
]


def rates_of_transformers(name, *, steps, warmup_steps, past=0, **kwargs):
    """The rate of every update of a run, as the Trainer sets it: one scheduler step after each optimizer step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    # transformers warns where its own get_scheduler is called with stable steps: the Trainer always gives both
    total = None if "num_stable_steps" in kwargs else steps
    scheduler = get_scheduler(name, optimizer, warmup_steps, total, kwargs)
    rates = []
    for _ in range(steps + past):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize(("name", "kwargs"), OPTIONS)
def test_every_update_has_the_rate_transformers_gives_it(name, kwargs, warmup_steps):
    steps = 40
    theirs = rates_of_transformers(name, steps=steps, warmup_steps=warmup_steps, past=5, **kwargs)
    ours = schedule(name, learning_rate=PEAK, steps=steps, warmup_steps=warmup_steps, **kwargs)
    np.testing.assert_allclose([ours(step) for step in range(steps + 5)], theirs, rtol=1e-12, atol=1e-18)
    traced = jax.jit(jax.vmap(ours))(jnp.arange(steps + 5))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, theirs, rtol=2e-6, atol=2e-7 * PEAK)


def test_all_names_of_the_schema_are_compared_here():
    assert {name for name, _ in OPTIONS} == set(SCHEDULES) == set(SCHEMA["training"]["lr_scheduler_type"].choices)


def test_a_long_run_does_not_drift_in_float32():
    steps = 1_000_000
    at = np.array([0, 1, 29_999, 30_000, 30_001, 353_333, 353_334, 676_667, 999_998, 999_999, 1_000_000])
    for name, kwargs in (("linear", {}), ("cosine", {}), ("cosine_with_restarts", {"num_cycles": 3})):
        rate = schedule(name, learning_rate=PEAK, steps=steps, warmup_ratio=0.03, **kwargs)
        exact = np.array([rate(int(step)) for step in at])
        np.testing.assert_allclose(jax.jit(jax.vmap(rate))(at), exact, rtol=2e-6, atol=2e-7 * PEAK)


def test_with_warmup_the_first_update_has_rate_zero_and_without_it_the_full_rate():
    assert schedule("linear", learning_rate=1.0, steps=10, warmup_steps=2)(0) == 0.0
    assert schedule("linear", learning_rate=1.0, steps=10)(0) == 1.0
    assert schedule("linear", learning_rate=1.0, steps=10)(9) == pytest.approx(0.1)  # the last update is not at 0


@pytest.mark.parametrize(
    ("steps", "warmup_steps", "warmup_ratio", "expected"),
    [
        (100, None, None, 0),
        (100, 0, None, 0),
        (100, 7, None, 7),
        (100, 0.03, None, 3),  # below 1: a share
        (101, 0.03, None, 4),  # 3.03, rounded up
        (101, None, 0.03, 4),
        (100, 0, 0.1, 10),  # 0 is "not set"
        (100, 5, 0.5, 5),  # steps win
        (100, None, 1.0, 100),
    ],
)
def test_warmup_is_given_in_steps_or_as_a_share_rounded_up(steps, warmup_steps, warmup_ratio, expected):
    assert warmup(steps, warmup_steps=warmup_steps, warmup_ratio=warmup_ratio) == expected


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("cosin", {}, "lr_scheduler_type is 'cosin'; allowed: linear, cosine, "),
        ("reduce_lr_on_plateau", {}, "not implemented yet: lr_scheduler_type 'reduce_lr_on_plateau'"),
        ("greedy", {}, "not implemented yet: lr_scheduler_type 'greedy'"),
        ("linear", {"num_cycles": 2}, "lr_scheduler_kwargs has num_cycles; 'linear' takes none"),
        ("cosine", {"min_lr": 1e-6}, "lr_scheduler_kwargs has min_lr; 'cosine' takes num_cycles"),
        ("cosine_with_min_lr", {}, "needs one of min_lr and min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "needs one of min_lr and min_lr_rate"),
        ("cosine_with_restarts", {"num_cycles": 1.5}, "takes a whole number from 1"),
        ("polynomial", {"lr_end": 1.0}, "needs it below learning_rate, which is 0.0003"),
        ("warmup_stable_decay", {}, "needs lr_scheduler_kwargs.num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 1, "decay_type": "exp"}, "decay_type is 'exp'; allowed: linear, "),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 8, "warmup_steps": 3},
            "3 steps of warmup and 8 of decay in a run of",
        ),
        ("linear", {"warmup_steps": -1}, "warmup_steps is -1"),
        ("linear", {"warmup_ratio": 1.5}, "warmup_ratio is 1.5; allowed: 0 to 1"),
    ],
)
def test_an_impossible_schedule_says_what_is_possible(name, kwargs, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        schedule(name, learning_rate=PEAK, steps=10, **kwargs)
