"""From text to a model that writes: a tokenizer is learned, a model drawn and trained, and what it leaves loads and
answers; and what does not fit together is told.
"""

import json
from pathlib import Path

import jax
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from configs import derived
from configs.load import load
from launch.assemble import open_model
from launch.cli import app
from launch.train import run
from models.decoder import abstract_params
from models.families import decoder_config
from tests.tiny import sentence

QUICKSTART = Path("configs/quickstart/pretrain_model/config.json")
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory, root) -> Path:
    """A folder with a corpus, its tokenizer, the quickstart's config.json made smaller, and the configuration."""
    folder = tmp_path_factory.mktemp("pretraining")
    text = "".join(json.dumps({"text": sentence(i, 20 + i % 30)}) + "\n" for i in range(120))
    (folder / "corpus.jsonl").write_text(text)
    arguments = ["tokenizer", "train", str(folder / "corpus.jsonl"), "--vocab-size", "320"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(folder / "tokenizer")])
    assert done.exit_code == 0, done.output
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(json.loads((root / QUICKSTART).read_text()) | SIZES))
    data = {"datasets": [{"dataset_name": "text", "dataset_path": str(folder / "corpus.jsonl")}], "pack": True}
    written = {
        "model": {
            "model_name": str(folder / "model"),
            "tokenizer_name": str(folder / "tokenizer"),
            "load_pretrained_weights": False,
            "model_max_length": 64,
        },
        "data": {"train": data, "validation": data},
        "training": {
            "trainer_type": "OUMI",
            "output_dir": str(folder / "output"),
            "max_tokens": 40 * 8 * 64,
            "warmup_tokens": 1000,
            "lr_scheduler_type": "wsd",
            "lr_scheduler_kwargs": {"num_decay_tokens": 10 * 8 * 64},
            "learning_rate": 1e-2,
            "z_loss": 1e-4,
            "per_device_train_batch_size": 1,
            "eval_strategy": "steps",
            "eval_steps": 20,
            "logging_steps": 10,
            "save_steps": 0,
            "enable_tensorboard": False,
            "compile_cache_dir": None,
        },
    }
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(written))
    return folder / "pretrain.yaml"


def test_a_model_from_nothing_learns_to_write_its_corpus(config, capsys):
    run(load(str(config)))
    said = capsys.readouterr().out
    assert "compiling for rows of 64 tokens; 1 shape so far" in said
    assert "perplexity" in said
    output = config.parent / "output"
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if "loss" in event]
    assert len(losses) == 4
    assert losses[-1] < 0.5 * losses[0]
    assert all(event["z_loss"] > 0 for event in events if "loss" in event)
    rates = {event["step"]: event["learning_rate"] for event in events if "loss" in event}
    assert rates[20] == rates[30] == 1e-2  # stable until the last ten steps
    assert rates[40] < 1e-3
    evaluated = [event for event in events if "eval_loss" in event]
    assert [event["step"] for event in evaluated] == [20, 40]
    assert evaluated[1]["eval_perplexity"] < evaluated[0]["eval_perplexity"]
    assert "bits a byte" in (output / "report.html").read_text()

    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    ids = tokenizer("grain", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    written = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
    assert set(written.replace(".", "").split()) <= set(sentence(1, 500).replace(".", "").split())
    done = CliRunner().invoke(app, ["generate", "-m", str(output), "grain", "--max-new-tokens", "12"])
    assert done.exit_code == 0, done.output
    assert done.output.strip() == written.strip()


def test_training_goes_on_from_the_weights_of_another_run(config, tiny_chat_model):
    words = ["--model.load_pretrained_weights=true", f"--model.model_name={tiny_chat_model}"]
    words += [
        "--model.tokenizer_name=null",
        "--training.max_tokens=4096",
        f"--training.output_dir={config.parent}/continued",
    ]
    words += ["--training.lr_scheduler_kwargs={num_decay_tokens: 1024}"]
    run(load(str(config), words))
    assert (config.parent / "continued/model.safetensors").is_file()


def test_a_tokenizer_larger_than_the_models_vocabulary_is_told_with_the_cure(config):
    loaded = load(str(config), ["--model.model_kwargs={vocab_size: 300}"])
    with pytest.raises(ValueError, match=r"317 tokens and the model 300 .*set model\.model_kwargs\.vocab_size: 317"):
        open_model(loaded.config)


def test_the_quickstarts_model_is_of_ten_to_twenty_million_parameters_and_holds_its_tokenizer(root):
    text = (root / "configs/quickstart/pretrain.yaml").read_text()
    asked = int(text.partition("--vocab-size ")[2].split()[0])
    model = decoder_config(json.loads((root / QUICKSTART).read_text()))
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_params(model, dtype="float32"))]
    assert 10_000_000 < sum(sizes) < 20_000_000
    assert asked == model.vocabulary
    loaded = load(str(root / "configs/quickstart/pretrain.yaml")).config
    rows = loaded.training.per_device_train_batch_size
    assert f"# {derived.steps(loaded, rows_per_step=rows).run} steps of {rows} rows" in text
