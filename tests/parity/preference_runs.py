"""Runs of preference learning by ours, from a configuration file to an exported model, and how they compare with TRL's.

Ours runs on eight fake devices with one row each where TRL has a batch of eight.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import yaml
from safetensors.numpy import load_file, save_file

from configs.load import load
from launch import assemble
from launch.export import Described, write_adapter
from launch.train import run
from tests.parity.oracle_preference import Run, distance, train
from tests.tiny import sentence

STEPS, BATCH = 10, 8
LENGTH = 128  # of a prompt with an answer, at most
Adapter = Literal["new", "of peft"] | None  # None: the whole model is trained
RATES: dict[Adapter, float] = {None: 1e-3, "new": 1e-2, "of peft": 1e-2}
NAMES = {"TRL_DPO": "preference_pairs_jsonl", "TRL_KTO": "text_sft"}  # what files of such rows are called
WEIGHTS = {False: "model.safetensors", True: "adapter_model.safetensors"}  # whether it is an adapter


def pairs(count: int = 80) -> list[dict[str, Any]]:
    """Prompts of one to five messages with two answers of 1 to some 20 words, no two of the same number of tokens."""
    rows = []
    for i in range(count):
        prompt = [{"role": "system", "content": sentence(i, 2)}] if i % 4 == 0 else []
        for turn in range(1 + i % 2):
            prompt += [
                {"role": "user", "content": sentence(5 * i + turn, 2 + i % 5)},
                {"role": "assistant", "content": sentence(3 * i + turn, 1 + i % 4)},
            ]
        lengths = {"chosen": 1 + (3 * i) % 19, "rejected": 2 + (5 * i) % 17}
        answers = {
            name: [{"role": "assistant", "content": sentence(11 * i + at, words)}]
            for at, (name, words) in enumerate(lengths.items())
        }
        rows.append({"prompt": prompt[:-1], **answers})
    return rows


def strings(count: int = 80) -> list[dict[str, str]]:
    """The last question of the same rows and their answers as text, where an answer begins with a space."""
    return [
        {
            "prompt": row["prompt"][-1]["content"],
            **{name: " " + row[name][0]["content"] for name in ("chosen", "rejected")},
        }
        for row in pairs(count)
    ]


def labelled(count: int = 80, *, none_to_avoid: slice = slice(0)) -> list[dict[str, Any]]:
    """The same rows with one answer each, five of seven wanted, and of those of `none_to_avoid` all."""
    rows = []
    for i, row in enumerate(pairs(count)):
        wanted = i in range(count)[none_to_avoid] or (i * i) % 7 != 4
        rows.append({"prompt": row["prompt"], "completion": row["chosen" if wanted else "rejected"], "label": wanted})
    return rows


def adapter_of_peft(model: Path, folder: Path) -> Path:
    """A folder of peft's with an adapter that does something: B drawn at random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings).save_pretrained(folder)
    random, file = np.random.default_rng(0), folder / WEIGHTS[True]
    tensors = {
        name: random.normal(scale=0.02 if "lora_B" in name else 0.1, size=value.shape).astype(np.float32)
        for name, value in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def both(
    trainer_type: str,
    kind: str,
    model: Path,
    rows: Sequence[dict[str, Any]],
    folder: Path,
    *,
    settings: Mapping[str, Any],
    instead: Mapping[str, Any] | None = None,
    adapter: Adapter = None,
    accumulation: int = 1,
) -> tuple[Run, Run]:
    """The same ten steps by ours, and by TRL's trainer of that kind: `settings` are `trainer_kwargs` there, arguments
    here, or `instead` are. The whole model is trained, a new adapter of ours, or one that peft wrote.
    """
    training = {
        "trainer_type": trainer_type,
        "learning_rate": RATES[adapter],
        "gradient_accumulation_steps": accumulation,
        "trainer_kwargs": {"train_sampling_strategy": "sequential", "max_length": LENGTH, **settings},
    }
    begun = adapter_of_peft(model, folder / "begun") if adapter == "of peft" else None
    file = _configured(model, rows, folder, training=training, begun=begun, new=adapter == "new")
    if adapter == "new":
        begun = _adapter_at_first(file, folder / "begun")
    theirs = train(
        kind,
        model,
        rows,
        steps=STEPS,
        batch=BATCH,
        accumulation=accumulation,
        adapter=begun,
        learning_rate=RATES[adapter],
        **{"max_length": LENGTH, **(settings if instead is None else instead)},
    )
    return _einkorn(file, before=begun or model), theirs


def _configured(
    model: Path,
    rows: Sequence[dict[str, Any]],
    folder: Path,
    *,
    training: dict[str, Any],
    begun: Path | None,
    new: bool,
) -> Path:
    """A configuration file in `folder`, beside the rows."""
    data, config = folder / "rows.jsonl", folder / "config.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections: dict[str, dict[str, Any]] = {
        "model": {"model_name": str(model), "torch_dtype_str": "float32"},
        "data": {"train": {"datasets": [{"dataset_name": NAMES[training["trainer_type"]], "dataset_path": str(data)}]}},
        "training": {
            "output_dir": str(folder / "output"),
            "per_device_train_batch_size": BATCH // jax.device_count(),
            "max_steps": STEPS,
            "logging_steps": 1,
            "save_steps": 0,
            "enable_tensorboard": False,
            "compile_cache_dir": None,
            "token_cache_dir": None,
            "use_peft": new or begun is not None,
            **training,
        },
    }
    if begun is not None:
        sections["model"]["adapter_model"] = str(begun)
    if new:
        sections["peft"] = {"lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["all-linear"]}
    config.write_text(yaml.safe_dump(sections))
    return config


def _adapter_at_first(file: Path, folder: Path) -> Path:
    """The adapter that a run of this configuration begins with, as a folder that peft reads."""
    config = load(str(file)).config
    model, mesh = assemble.open_model(config), assemble.prepare_devices(config)
    trained = assemble.load_parts(model, mesh, pretrained=True, seed=config.training.seed).trained
    about = Described(model.config, model.hf_config, model.dtype, model.lora, model.base, model.tokenizer, None)
    write_adapter(folder, trained, about)
    return folder


def _einkorn(file: Path, *, before: Path) -> Run:
    """What `einkorn train` logs and leaves behind; `before` is the folder of what it trains, a model or an adapter."""
    loaded = load(str(file))
    run(loaded)
    training = loaded.config.training
    output, name = Path(training.output_dir), WEIGHTS[training.use_peft]
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    log = [event for event in events if "loss" in event]
    assert [event["step"] for event in log] == list(range(1, STEPS + 1))
    numbers = {name for event in log for name, value in event.items() if isinstance(value, float)}
    logged = {name: np.array([event.get(name, np.nan) for event in log], np.float64) for name in numbers}
    return Run(logged, load_file(before / name), load_file(output / name))


def assert_same(ours: Run, theirs: Run, *, beta: float = 0.1, but: Sequence[str] = ()) -> None:
    """Every number that TRL logs, 1e-4 relative, and what was learned, 1e-3 relative; `but` names what differs.

    What is a difference of larger numbers cannot be closer than these are in float32: rewards and log odds, of
    log-probabilities, and the mean logit, of logits of either sign and some 0.2 in this model.
    """
    summed = 2e-6 * max(np.nanmax(np.abs(theirs.log[name])) for name in ("logps/chosen", "logps/rejected"))
    rounding = {"rewards/": beta * summed, "kl": summed, "log_odds": summed, "logits/": 5e-7}
    for name in sorted(theirs.log.keys() - set(but)):
        np.testing.assert_allclose(
            ours.log[name],
            theirs.log[name],
            rtol=1e-12 if name == "learning_rate" else 1e-4,
            atol=next((size for start, size in rounding.items() if name.startswith(start)), 0),
            err_msg=name,
        )
    for name, value in theirs.before.items():
        np.testing.assert_array_equal(ours.before[name], value, err_msg=name)
    assert distance(ours, theirs) < 1e-3
