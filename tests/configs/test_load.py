"""From a file and a command line to a configuration: precedence, spelling, who set what, and the way back to YAML."""

import math
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.default import SCHEMA
from configs.key import LATER, Key, leaves
from configs.load import ConfigError, dump, explain, load, plain
from configs.yaml_text import parse

SFT = """\
model:
  model_name: some/model
data:
  train:
    datasets:
      - dataset_name: text_sft
        dataset_path: train.jsonl
training:
  trainer_type: TRL_SFT
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes a configuration into the current folder and gives its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "run.yaml") -> str:
        (tmp_path / name).write_text(textwrap.dedent(text), encoding="utf-8")
        return name

    return write


def test_the_file_wins_over_defaults_and_the_command_line_over_both(file):
    loaded = load(file(SFT + "  seed: 1\n  max_steps: 5\n"), ["--training.max_steps", "7"])
    training = loaded.config.training
    assert (training.seed, training.max_steps, training.data_seed) == (1, 7, 42)
    assert loaded.origin == {
        "model.model_name": "run.yaml:2",
        "data.train.datasets": "run.yaml:5",
        "data.train.datasets[0].dataset_name": "run.yaml:6",
        "data.train.datasets[0].dataset_path": "run.yaml:7",
        "training.trainer_type": "run.yaml:9",
        "training.seed": "run.yaml:10",
        "training.max_steps": "command line",
    }


def test_a_loaded_configuration_is_locked(file):
    config = load(file(SFT)).config
    with pytest.raises(AttributeError):
        config.training.learning_rte = 1
    with pytest.raises(AttributeError):
        config.data.train.datasets[0].splt = "x"


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--training.learning_rate", "5e-7"], 5e-7),
        (["--training.learning_rate=1e3"], 1000.0),
        (["--training.learning_rate", "1"], 1.0),
        (["--training.learning_rate='2e-5'"], 2e-5),
        (["--training.learning_rate", ".5"], 0.5),
    ],
)
def test_numbers_are_numbers_with_or_without_a_dot(file, words, value):
    assert load(file(SFT), words).config.training.learning_rate == value


@pytest.mark.parametrize(
    ("word", "value"),
    [("007", "007"), ("1e3", "1e3"), ("true story", "true story"), ("a #1", "a #1"), ("2025-01-02", "2025-01-02")],
)
def test_a_name_stays_as_it_is_spelled(file, word, value):
    assert load(file(SFT), ["--training.output_dir", word]).config.training.output_dir == value


def test_what_looks_like_an_interpolation_stays_text(file):
    config = load(file(SFT + '  output_dir: ${training.run_name}/out\n  logging_dir: "${oc.env:HOME}"\n')).config
    assert config.training.output_dir == "${training.run_name}/out"
    assert config.training.logging_dir == "${oc.env:HOME}"


@pytest.mark.parametrize("word", ["trl_sft", "TRL_SFT", "Trl_Sft"])
def test_words_may_be_written_in_any_case(file, word):
    assert load(file(SFT), ["--training.trainer_type", word]).config.training.trainer_type == "TRL_SFT"


@pytest.mark.parametrize("word", ["no", "off", "False", "false", "0", "'no'"])
def test_switches_take_every_word_for_off(file, word):
    assert load(file(SFT), [f"--training.enable_tensorboard={word}"]).config.training.enable_tensorboard is False


def test_an_unquoted_no_is_the_word_no_where_that_is_allowed(file):
    assert load(file(SFT + "  eval_strategy: no\n")).config.training.eval_strategy == "no"


def test_a_switch_needs_no_value(file):
    training = load(file(SFT), ["--training.save_epoch", "--training.max_steps", "-1"]).config.training
    assert (training.save_epoch, training.max_steps) == (True, -1)


@pytest.mark.parametrize("path", ["data.train.datasets[0].split", "data.train.datasets.0.split"])
def test_an_entry_of_a_list_is_reached_by_its_number(file, path):
    dataset = load(file(SFT), [f"--{path}", "test"]).config.data.train.datasets[0]
    assert (dataset.dataset_name, dataset.split) == ("text_sft", "test")


def test_one_past_the_last_entry_appends(file):
    datasets = load(file(SFT), ["--data.train.datasets[1].dataset_name", "b"]).config.data.train.datasets
    assert [dataset.dataset_name for dataset in datasets] == ["text_sft", "b"]


def test_a_list_is_replaced_and_a_mapping_merged(file):
    words = ["--data.train.datasets=[{dataset_name: q}]", "--model.model_kwargs.rope_theta", "1e6"]
    loaded = load(file(SFT.replace("some/model", "some/model\n  model_kwargs: {rms_norm_eps: 1e-6}")), words)
    assert [dataset.dataset_name for dataset in loaded.config.data.train.datasets] == ["q"]
    assert loaded.config.model.model_kwargs == {"rms_norm_eps": 1e-6, "rope_theta": 1e6}
    assert loaded.origin["model.model_kwargs"] == "run.yaml:3, command line"


def test_a_whole_section_may_be_given_on_the_command_line(file):
    training = load(file(SFT), ["--training", "{max_steps: 3, seed: 9}"]).config.training
    assert (training.max_steps, training.seed, training.trainer_type) == (3, 9, "TRL_SFT")


def test_launchers_rank_words_are_ignored(file):
    load(file(SFT), ["--local-rank=0", "--local_rank", "1"])


def test_anchors_and_merge_keys_work(file):
    text = (
        SFT
        + "  trainer_kwargs: &a {max_length: 64}\n  lr_scheduler_kwargs:\n    <<: {num_cycles: 2}\n    num_cycles: 3\n"
    )
    training = load(file(text)).config.training
    assert (training.trainer_kwargs.max_length, training.lr_scheduler_kwargs) == (64, {"num_cycles": 3})


def test_other_names_move_to_the_key_they_name(file):
    kwargs = "  trainer_kwargs: {packing: true, save_total_limit: 2}\n"
    loaded = load(file(SFT.replace("training:", "    max_length: 256\ntraining:") + kwargs))
    assert loaded.config.model.model_max_length == 256
    assert loaded.config.data.train.pack is True
    assert loaded.config.training.keep_checkpoints == 2
    assert loaded.origin["model.model_max_length"] == "run.yaml:8 as data.train.max_length"
    assert loaded.notices == ()


def test_a_key_wins_over_its_other_name_and_the_log_says_so(file):
    loaded = load(file(SFT + "  keep_checkpoints: 3\n  trainer_kwargs: {save_total_limit: 2}\n"))
    assert loaded.config.training.keep_checkpoints == 3
    assert loaded.notices == ("training.trainer_kwargs.save_total_limit: 2 gives way to training.keep_checkpoints: 3",)


def test_keys_without_effect_are_listed_once_and_only_where_changed(file):
    text = SFT.replace("some/model", "some/model\n  trust_remote_code: true\n  device_map: auto")
    loaded = load(file(text + "  dataloader_num_workers: auto\n  grpo: {temperature: 0.5}\n"))
    assert loaded.notices == (
        "no effect here: model.trust_remote_code",
        "no effect with training.trainer_type TRL_SFT: training.grpo.temperature",
    )


def test_words_of_other_programs_are_translated_aloud(file):
    loaded = load(file(SFT.replace("some/model", "some/model\n  attn_implementation: sdpa\n  torch_dtype_str: bf16")))
    assert (loaded.config.model.attn_implementation, loaded.config.model.torch_dtype_str) == ("auto", "bfloat16")
    assert loaded.notices == (
        "model.torch_dtype_str: bf16 is read as bfloat16",
        "model.attn_implementation: sdpa is read as auto",
    )


PYTHON = """\
from configs.default import get_config as default

def get_config(size):
    config = default()
    config.model.model_name = f"some/{size}"
    config.data.train.datasets = [{"dataset_name": "text_sft"}]
    config.training.learning_rate = 1
    return config
"""


def test_a_python_file_makes_its_configuration_from_an_argument(file):
    loaded = load(file(PYTHON, "run.py") + ":small", ["--training.seed=3"])
    assert loaded.config.model.model_name == "some/small"
    assert loaded.config.training.learning_rate == 1.0
    assert loaded.origin == {
        "model.model_name": "run.py",
        "data.train.datasets": "run.py",
        "data.train.datasets[0].dataset_name": "run.py",
        "training.learning_rate": "run.py",
        "training.seed": "command line",
    }


def test_a_python_file_may_say_only_what_it_changes(file):
    text = """
        from pathlib import Path

        def get_config():
            datasets = ({"dataset_name": "text_sft", "dataset_path": Path("a") / "b.jsonl"},)
            return {"model": {"model_name": "m"}, "data": {"train": {"datasets": datasets}}}
    """
    config = load(file(text, "run.py")).config
    assert config.data.train.datasets[0].dataset_path == "a/b.jsonl"


def test_the_same_settings_say_the_same_in_yaml_and_python(file):
    text = "def get_config():\n    return {'model': {'model_name': 'some/model'}, 'data': {'train': {'datasets': [\n"
    text += "        {'dataset_name': 'text_sft', 'dataset_path': 'train.jsonl'}]}},\n"
    text += "        'training': {'trainer_type': 'TRL_SFT'}}\n"
    assert load(file(text, "run.py")).config == load(file(SFT)).config


def test_the_effective_configuration_names_who_set_what(file):
    rows = {row.path: row for row in explain(load(file(SFT), ["--training.learning_rate=1e-4"]))}
    assert rows["training.learning_rate"][1:3] == ("0.0001", "command line")
    assert rows["training.trainer_type"][1:3] == ("TRL_SFT", "run.yaml:9")
    assert rows["training.seed"] == ("training.seed", "42", "default", "of everything random but data")
    assert "deepspeed.reduce_bucket_size" not in rows  # does nothing, and nobody set it


def test_credentials_are_in_no_dump_and_no_row(file):
    secret = "hf_" + "a1B2" * 8
    words = [
        f"--model.tokenizer_kwargs.token={secret}",
        f"--training.run_name={secret}",
        "--model.model_revision=" + "a" * 40,
    ]
    loaded = load(file(SFT), words)
    told = dump(loaded.config) + repr(explain(loaded)) + repr(loaded.notices) + repr(plain(loaded.config))
    assert secret not in told
    assert "token: '***'" in told
    assert "a" * 40 in told  # a commit is none


def test_the_plain_form_has_every_key(file):
    config = load(file(SFT)).config
    values = plain(config)
    assert values["data"]["train"]["datasets"][0]["dataset_name"] == "text_sft"
    assert values["training"]["telemetry"] == config.training.telemetry.to_dict()
    assert list(values["training"]) == list(config.training)


def test_a_dump_loads_to_the_same_configuration(file):
    text = SFT + "  output_dir: 1e3\n  trainer_kwargs: {max_length: null, packing: off}\n"
    text += "  lr_scheduler_kwargs: {a: [1, {b: 1e3}]}\n"
    config = load(file(text), ["--model.trust_remote_code", "--mesh.tensor=2"]).config
    assert load(file(dump(config), "again.yaml")).config == config


# Any key that does something, with any value it takes, goes through a dump and comes back.
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C",)), max_size=20)
VALUES = {
    str: NAMES,
    int: st.integers(-1, 10**9),
    float: st.floats(0, 1, allow_subnormal=False),
    bool: st.booleans(),
    list: st.lists(NAMES, max_size=3),
    dict: st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | NAMES, st.lists, max_leaves=4
        ),
        max_size=3,
    ),
}


def test_an_optimizer_may_be_a_function_and_a_slip_in_its_name_is_no_function(file):
    given = load(file(SFT), ["--training.optimizer", "my/own.py:lamb"])
    assert given.config.training.optimizer == "my/own.py:lamb"
    with pytest.raises(
        ConfigError, match=r"got 'adamx'; allowed: adamw_torch, .*, file\.py:function; did you mean adam"
    ):
        load(file(SFT), ["--training.optimizer", "adamx"])


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_comes_back_from_a_dump(file, data):
    keys = {
        path: key for path, key in leaves(SCHEMA) if isinstance(key, Key) and key.effect != LATER and "[]" not in path
    }
    path = data.draw(st.sampled_from(sorted(keys)))
    key = keys[path]
    value = data.draw(st.sampled_from(key.choices) if key.choices else VALUES[key.kind])
    section = {"model": {"model_name": "m"}, "data": {"train": {"datasets": [{"dataset_name": "d"}]}}}
    *names, last = path.split(".")
    inner = section
    for name in names:
        inner = inner.setdefault(name, {})
    inner[last] = value
    try:
        config = load(file(f"def get_config():\n    inf = float('inf')\n    return {section!r}\n", "run.py")).config
    except ConfigError:
        return  # out of range, to come, or against a rule: not what is asked here
    assert load(file(dump(config), "again.yaml")).config == config


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_yaml_or_a_value_error_of_one_line(text):
    line = _refusal(lambda: parse(text, "a.yaml"))
    assert line is None or (line.startswith("a.yaml:") and "\n" not in line)


@given(st.lists(st.text(max_size=20), max_size=4))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_command_line_is_read_or_refused_in_lines(file, words):
    name = file(SFT)
    text = _refusal(lambda: load(name, words))
    assert text is None or all(line.endswith("(command line)") for line in text.split("\n"))


def _refusal(call) -> str | None:
    """The text of the ValueError a call ends in, if it does."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000.0),
        ("5E-7", 5e-7),
        ("1_000", 1000),
        ("0x1F", 31),
        ("1.", 1.0),
        ("-.5", -0.5),
        ("010", "010"),
        ("1:30", "1:30"),
        ("~", None),
    ],
)
def test_scalars_are_read_as_yaml_is_today(text, value):
    assert parse(f"a: {text}", "x").value["a"].value == value


def test_infinity_is_a_number_of_free_form_values_only(file):
    assert math.isinf(load(file(SFT + "  lr_scheduler_kwargs: {a: .inf}\n")).config.training.lr_scheduler_kwargs["a"])
    with pytest.raises(ConfigError, match=r"got .inf; allowed: a number"):
        load(file(SFT), ["--training.learning_rate=.inf"])
