"""What several keys decide together: lengths, dtypes, recomputation, names, and the mesh."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import derived
from configs.default import get_config

STRATEGIES = {
    "FULL_SHARD": {"data": 1, "fsdp": -1},
    "SHARD_GRAD_OP": {"data": 1, "fsdp": -1},
    "HYBRID_SHARD": {"data": 4, "fsdp": -1},
    "HYBRID_SHARD_ZERO2": {"data": 4, "fsdp": -1},
    "NO_SHARD": {"data": -1, "fsdp": 1},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fsdp_strategies_become_axes_of_the_mesh(strategy):
    config = get_config()
    config.fsdp.enable_fsdp = True
    config.fsdp.sharding_strategy = strategy
    assert derived.mesh_axes(config, hosts=4) == STRATEGIES[strategy] | {"expert": 1, "tensor": 1, "context": 1}


def test_without_fsdp_each_device_holds_a_copy():
    assert derived.mesh_axes(get_config(), hosts=4) == {
        "data": -1,
        "fsdp": 1,
        "expert": 1,
        "tensor": 1,
        "context": 1,
    }


@pytest.mark.parametrize(
    ("stage", "axes"), [("ZERO_0", (-1, 1)), ("ZERO_1", (-1, 1)), ("ZERO_2", (-1, 1)), ("ZERO_3", (1, -1))]
)
def test_stages_of_deepspeed_become_axes_too(stage, axes):
    config = get_config()
    config.deepspeed.enable_deepspeed = True
    config.deepspeed.zero_stage = stage
    sizes = derived.mesh_axes(config)
    assert (sizes["data"], sizes["fsdp"]) == axes
    shared = derived.memory(config)
    assert shared == {
        "split_state": stage in ("ZERO_1", "ZERO_2"),
        "split_gradients": stage == "ZERO_2",
        "on_host": False,
    }
    config.deepspeed.offload_optimizer = {"device": "cpu"}
    assert derived.memory(config) == shared | {"on_host": True}


def test_each_of_several_slices_holds_a_copy_of_the_model_unless_told_otherwise():
    config = get_config()
    config.mesh.fsdp = -1
    assert derived.mesh_axes(config, slices=2) == {"data": 2, "fsdp": -1, "expert": 1, "tensor": 1, "context": 1}
    config.mesh.data = 4
    assert derived.mesh_axes(config, slices=2)["data"] == 4
    assert derived.mesh_axes(get_config(), slices=2)["data"] == -1


@pytest.mark.parametrize(
    ("asked", "axes"),
    [
        ({"tensor": 2}, (-1, 1, 1, 2, 1)),  # the rest stays where fsdp.* put it
        ({"fsdp": 8}, (-1, 8, 1, 1, 1)),
        ({"fsdp": -1}, (1, -1, 1, 1, 1)),  # asked for, it takes the rest from data
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 1, 2, 1)),
        ({"fsdp": -1, "expert": 4}, (1, -1, 4, 1, 1)),
        ({"context": -1}, (1, 1, 1, 1, -1)),
    ],
)
def test_the_mesh_wins_over_fsdp(asked, axes):
    config = get_config()
    config.mesh.update(asked)
    assert tuple(derived.mesh_axes(config).values()) == axes


SIZES = st.none() | st.integers(1, 4)


@given(st.tuples(*[SIZES] * 5), st.integers(0, 5), st.sampled_from(sorted(STRATEGIES)), st.booleans())
def test_a_mesh_never_has_two_axes_of_the_rest(sizes, rest, strategy, fsdp):
    config = get_config()
    config.fsdp.enable_fsdp, config.fsdp.sharding_strategy = fsdp, strategy
    asked = {
        axis: -1 if number == rest else size
        for number, (axis, size) in enumerate(zip(derived.AXES, sizes, strict=True))
    }
    config.mesh.update(asked)
    axes = derived.mesh_axes(config, hosts=2)
    assert list(axes.values()).count(-1) <= 1
    assert all(axes[axis] == size for axis, size in asked.items() if size is not None)


def test_the_length_is_the_models_and_else_trls():
    config = get_config()
    assert derived.max_length(config) == 1024
    config.training.trainer_kwargs.max_length = None
    assert derived.max_length(config) is None
    config.model.model_max_length = 4096
    assert derived.max_length(config) == 4096


def test_gradient_checkpointing_recomputes_everything_unless_a_policy_says_what():
    config = get_config()
    assert derived.remat_policy(config) == "none"
    config.training.enable_gradient_checkpointing = True
    assert derived.remat_policy(config) == "full"
    config.training.trainer_kwargs.activation_offloading = True
    assert derived.remat_policy(config) == "offload"
    config.training.remat_policy = "dots"
    assert derived.remat_policy(config) == "dots"


def test_the_compute_dtype_is_that_of_mixed_precision_or_of_fsdp_over_float32():
    config = get_config()
    assert derived.compute_dtype(config) is None
    config.fsdp.enable_fsdp, config.fsdp.mixed_precision = True, "bf16"
    assert derived.compute_dtype(config) is None  # the checkpoint's dtype is not known to be float32
    config.model.torch_dtype_str = "float32"
    assert derived.compute_dtype(config) == "bfloat16"
    config.fsdp.enable_fsdp = False
    assert derived.compute_dtype(config) is None
    config.training.mixed_precision_dtype = "BF16"
    assert derived.compute_dtype(config) == "bfloat16"


def test_a_run_name_is_made_fit_for_folders_and_trackers():
    config = get_config()
    assert derived.run_name(config) is None
    config.training.run_name = "my run/№1.b_c-d"
    assert derived.run_name(config) == "my_run__1.b_c-d"
    config.training.run_name = "a" * 101
    assert derived.run_name(config) == "a" * 91 + "_9d079339"


def test_tokens_become_steps_by_the_tokens_of_a_step_rounded_up():
    config = get_config()
    config.data.train.pack = True
    config.model.model_max_length = 100
    config.training.update(max_tokens=10_001, warmup_tokens=800, lr_scheduler_type="warmup_stable_decay")
    config.training.lr_scheduler_kwargs = {"num_decay_tokens": 1_200, "decay_type": "linear"}
    assert derived.steps(config, rows_per_step=4) == (26, 2, {"num_decay_steps": 3, "decay_type": "linear"})


def test_what_is_set_in_steps_stays_as_it_is():
    config = get_config()
    assert derived.steps(config, rows_per_step=4) == (None, None, {})
    config.training.update(max_steps=7, warmup_steps=2, lr_scheduler_kwargs={"num_cycles": 2})
    assert derived.steps(config, rows_per_step=4) == (7, 2, {"num_cycles": 2})


def test_tokens_of_a_schedule_must_be_a_number():
    config = get_config()
    config.data.train.pack = True
    config.training.lr_scheduler_kwargs = {"num_decay_tokens": "1M"}
    with pytest.raises(ValueError, match="num_decay_tokens is '1M'; allowed: a number of tokens"):
        derived.steps(config, rows_per_step=4)
