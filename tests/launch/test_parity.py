"""`einkorn parity`: it finds a sound model sound and a broken one broken, and says by how much."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, set_seed
from typer.testing import CliRunner, Result

from launch.cli import app
from launch.parity import Row, compare, sample_of, verdict
from launch.parity_einkorn import measure_einkorn
from launch.parity_torch import measure_transformers

ROOT = Path(__file__).resolve().parents[2]


def parity(folder: Path, *options: Any) -> Result:
    return CliRunner().invoke(app, ["parity", "-m", str(folder), *map(str, options)], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_chat_model: Path) -> Path:
    """Two layers and a tokenizer, 64 positions; weights large enough for attention to look somewhere."""
    folder = Path(shutil.copytree(tiny_chat_model, tmp_path_factory.mktemp("parity") / "llama"))
    config = LlamaConfig.from_pretrained(folder, initializer_range=0.2, max_position_embeddings=64)
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_sound_model_holds_and_the_table_has_the_noise_of_bfloat16_beside_it(llama: Path, tmp_path: Path) -> None:
    done = parity(llama, "--json", tmp_path / "numbers.json")
    assert done.exit_code == 0, done.output
    assert "parity holds: logits differ by" in done.output
    assert "logits, tokens 49–64" in done.output  # as many as the model has positions, not 2,048
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["holds"]
    assert numbers["tokens"] == 64
    for row in numbers["rows"][:2]:
        assert 0 < row["difference"] < 1e-5 < 1e-3 < row["theirs"] < 0.1
        assert 1e-3 < row["ours"] < 0.1
    ours, theirs = (numbers[program]["float32"] for program in ("einkorn", "transformers"))
    assert [len(answer) for answer in ours["greedy"]] == [32, 32]
    assert ours["greedy"] == theirs["greedy"]
    names = {"layer 0", "layer 1", "embed/embedding", "norm/scale"}
    assert set(ours["gradient_norms"]) == set(theirs["gradient_norms"]) == names


def test_a_model_that_computes_something_else_ends_with_code_1_and_names_what_is_off(
    llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "changed"))
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight *= 1.01
    model.save_pretrained(folder)
    done = parity(folder, "--against", llama)
    assert done.exit_code == 1
    line = next(line for line in done.output.splitlines() if line.startswith("parity FAILS: logits, tokens 1–16: "))
    assert "logits, tokens 49–64: " in line
    assert "gradient norm, layer 1: " in line
    assert line.count("allowed 1.0e-04") == 2


def test_positions_that_turn_at_another_speed_are_seen_far_more_than_rounding_is(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "broken"))
    fields = json.loads((folder / "config.json").read_text())
    fields["rope_parameters"]["rope_theta"] = 11_000.0  # instead of 10,000
    (folder / "config.json").write_text(json.dumps(fields))
    sample = sample_of(llama, length=64, text=None)
    (sound,), (broken,) = (measure_einkorn(one, sample, ["float32"]) for one in (llama, folder))
    (reference,) = measure_transformers(llama, sample, ["float32"])
    for ours, holds in ((sound, True), (broken, False)):
        rows = compare(sample, theirs32=reference, theirs16=reference, ours32=ours, ours16=ours)
        assert [row.holds for row in rows[:3]] == [holds] * 3


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=48, initializer_range=0.2, pad_token_id=3
        ),
        pytest.param(
            MixtralConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=4,
                output_router_logits=True,  # the loss then has a part that balances the experts
                router_aux_loss_coef=0.1,
                initializer_range=0.2,
                max_position_embeddings=48,
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["gpt2", "mixtral"],
)
def test_other_families_and_folders_without_a_tokenizer_are_compared_too(config: Any, tmp_path: Path) -> None:
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    sample = sample_of(tmp_path, length=2048, text=None)
    assert len(sample.text) == 48
    (ours,), (theirs,) = (of(tmp_path, sample, ["float32"]) for of in (measure_einkorn, measure_transformers))
    rows = compare(sample, theirs32=theirs, theirs16=theirs, ours32=ours, ours16=ours)
    assert all(row.holds for row in rows), verdict(rows)
    assert set(ours.gradient) == set(theirs.gradient)


def test_a_text_of_ones_own_is_read_and_one_too_short_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("grain water mill stone " * 40)
    done = parity(llama, "--text", tmp_path / "text")
    assert done.exit_code == 0, done.output
    assert "logits, tokens 49–64" in done.output
    (tmp_path / "text").write_text("grain")
    done = parity(llama, "--text", tmp_path / "text")
    assert isinstance(done.exception, ValueError)
    assert str(done.exception).startswith("parity needs more than 16 tokens, and there are ")


def test_without_torch_it_is_one_line_that_says_how_to_install_it(llama: Path) -> None:
    code = f"import sys; sys.modules['torch'] = None; sys.argv = ['einkorn', 'parity', '-m', {str(llama)!r}]\n"
    code += "from launch.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: parity compares with PyTorch, which is not installed: pip install 'einkorn[parity]'\n"
    )


def test_what_is_not_a_number_fails() -> None:
    row = Row("loss, nan", difference=float("nan"), allowed=1e-5, theirs=1e-3, ours=1e-3)
    assert not row.holds
    assert verdict([row]) == "parity FAILS: loss, nan: nan, allowed 1.0e-05"


def test_logits_that_bfloat16_spoils_more_than_in_transformers_fail() -> None:
    row = Row("logits, tokens 1–16", difference=1e-6, allowed=1e-4, theirs=1e-2, ours=5e-2)
    assert verdict([row]) == (
        "parity FAILS: logits, tokens 1–16: bfloat16 strays by 5.0e-02, that of transformers by 1.0e-02"
    )
