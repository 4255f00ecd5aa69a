"""Which changes of settings a resumed run takes, and which it refuses."""

import pytest

from trainers.resume import Differences, compare_configs, refuse_other_config

SAVED = {
    "model": {"model_name": "m", "attn_implementation": None, "model_kwargs": {}},
    "data": {
        "train": {"datasets": [{"dataset_name": "text_sft", "dataset_path": "a.jsonl"}], "pack": True},
        "validation": {"datasets": []},
    },
    "training": {
        "learning_rate": 1e-4,
        "max_steps": 10,
        "seed": 42,
        "output_dir": "a",
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
    },
    "mesh": {"fsdp": 8},
}


def with_value(config, path, value):
    key, _, rest = path.partition(".")
    return config | {key: with_value(config[key], rest, value) if rest else value}


def test_equal_settings_differ_in_nothing():
    assert compare_configs(SAVED, SAVED, same_rows_per_step=True) == Differences((), ())


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("model.model_name", "n", "model.model_name: m -> n"),
        ("model.model_kwargs", {"rope_theta": 1}, "model.model_kwargs.rope_theta: (not set) -> 1"),
        ("data.train.pack", False, "data.train.pack: True -> False"),
        (
            "data.train.datasets",
            [{"dataset_name": "text_sft", "dataset_path": "b.jsonl"}],
            "data.train.datasets[0].dataset_path: a.jsonl -> b.jsonl",
        ),
        ("training.seed", 43, "training.seed: 42 -> 43"),
    ],
)
def test_changes_of_data_model_or_seed_are_decisive(path, value, line):
    assert compare_configs(SAVED, with_value(SAVED, path, value), same_rows_per_step=True) == Differences((line,), ())


def test_a_dataset_more_is_decisive():
    more = with_value(SAVED, "data.train.datasets", SAVED["data"]["train"]["datasets"] * 2)
    (line,) = compare_configs(SAVED, more, same_rows_per_step=True).decisive
    assert line.startswith("data.train.datasets: [{'dataset_name': 'text_sft'")


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("training.learning_rate", 2e-4, "training.learning_rate: 0.0001 -> 0.0002"),
        ("training.max_steps", 20, "training.max_steps: 10 -> 20"),
        ("model.attn_implementation", "xla", "model.attn_implementation: null -> xla"),
    ],
)
def test_changes_of_schedule_or_kernel_are_told(path, value, line):
    assert compare_configs(SAVED, with_value(SAVED, path, value), same_rows_per_step=True) == Differences((), (line,))


@pytest.mark.parametrize(("path", "value"), [("training.output_dir", "b"), ("data.validation.datasets", [{}])])
def test_changes_of_places_and_of_evaluation_data_are_not_compared(path, value):
    assert compare_configs(SAVED, with_value(SAVED, path, value), same_rows_per_step=True) == Differences((), ())


def test_another_mesh_is_harmless_only_while_a_step_has_as_many_rows():
    now = with_value(with_value(SAVED, "mesh.fsdp", 4), "training.gradient_accumulation_steps", 2)
    lines = ("training.gradient_accumulation_steps: 1 -> 2", "mesh.fsdp: 8 -> 4")
    assert compare_configs(SAVED, now, same_rows_per_step=True) == Differences((), lines)
    assert compare_configs(SAVED, now, same_rows_per_step=False) == Differences(lines, ())


def test_a_decisive_change_is_refused_unless_allowed():
    now = with_value(with_value(SAVED, "training.seed", 1), "training.max_steps", 20)
    arguments = {"same_rows_per_step": True, "how_to_allow": "pass --allow-config-change"}
    with pytest.raises(ValueError, match="other settings") as error:
        refuse_other_config(SAVED, now, allowed=False, **arguments)
    assert str(error.value) == (
        "the checkpoint was saved with other settings of data, model or batch:\n"
        "  training.seed: 42 -> 1\n"
        "Set them back, start afresh in another training.output_dir, or pass --allow-config-change"
    )
    told = refuse_other_config(SAVED, now, allowed=True, **arguments)
    assert told == ("training.seed: 42 -> 1", "training.max_steps: 10 -> 20")
