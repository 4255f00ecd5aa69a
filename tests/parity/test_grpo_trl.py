"""GRPO against TRL's own trainer: the same answers give the same loss, log and gradient for every loss type and option,
and five whole steps end at the same weights.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.config import Compute
from models.families import decoder_config
from models.sharding import make_mesh
from models.weights import load_params, save_folder
from tests.parity.oracle_grpo import LONGEST, Run, Tensors, train
from trainers import optim
from trainers.grpo import answers_of, grpo_loss, reference_logprobs
from trainers.loop import device_batch
from trainers.policy_losses import LOSSES, SAMPLER_CORRECTIONS, GroupPolicy, group_policy_loss
from trainers.reference import Frozen
from trainers.scoring import Scorer
from trainers.step import build_step

TEMPERATURE = 0.7
LENGTH = 2 * LONGEST
RATE, DECAY, CLIP, STEPS = 1e-3, 0.1, 1.0, 5

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tight bounds": {"epsilon": 0.05, "epsilon_high": 0.1, "delta": 1.2},
    "reference": {"beta": 0.3},
    "reference, not weighed": {"beta": 0.3, "use_bias_correction_kl": False},
    "half the tokens": {"top_entropy_quantile": 0.5},
    "entropy": {"entropy_coef": 0.2},
    "entropy of a third of the tokens": {"entropy_coef": 0.2, "top_entropy_quantile": 0.3, "beta": 0.1},
    "far off answers left out": {"off_policy_mask_threshold": 0.01},
    "cut answers left out": {"mask_truncated_completions": True, "beta": 0.1},
    **{f"sampler, {mode}": {"vllm_importance_sampling_mode": mode} for mode in SAMPLER_CORRECTIONS},
    "sampler, bounds on either side": {
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 1.05,
        "vllm_importance_sampling_clip_min": 0.95,
    },
}
QUICK = (
    ("dapo", "token", "tight bounds"),
    ("grpo", "sequence", "cut answers left out"),
    ("vespo", "token", "sampler, token_mask"),
    ("sapo", "token", "reference, not weighed"),
)
GRID = [(loss, level, option) for loss in LOSSES for level in ("token", "sequence") for option in OPTIONS]


@pytest.fixture(scope="module")
def policy(tiny_chat_model, tmp_path_factory) -> Path:
    """The tiny model after some noise: what is trained, beside the model as it was."""
    folder = tmp_path_factory.mktemp("models") / "policy"
    folder.mkdir()
    for file in tiny_chat_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    random, file = np.random.default_rng(0), folder / "model.safetensors"
    tensors = {
        name: value + random.normal(scale=0.02, size=value.shape).astype(np.float32)
        for name, value in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def setting(loss_type: str, level: str, options: dict[str, Any]) -> GroupPolicy:
    """TRL's options under our names."""
    names = {
        "vllm_importance_sampling_mode": "sampler_correction",
        "vllm_importance_sampling_clip_max": "sampler_clip_max",
        "vllm_importance_sampling_clip_min": "sampler_clip_min",
    }
    given = {names.get(name, name): value for name, value in options.items() if name != "mask_truncated_completions"}
    return GroupPolicy(loss_type=loss_type, importance_sampling_level=level, max_completion_length=LONGEST, **given)


def read(folder: Path) -> Any:
    mesh = make_mesh({}, devices=jax.devices()[:1])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return load_params(folder, config_of(folder), shardings=place, dtype=jnp.float32)


def config_of(folder: Path) -> Any:
    return decoder_config(json.loads((folder / "config.json").read_text()))


def scorer(folder: Path) -> Scorer:
    return Scorer(config_of(folder), Compute(), shared=False, temperature=TEMPERATURE)


@functools.cache
def scores_and_gradient(folder: Path) -> Any:
    """(params, batch) → what is known of every token; (params, batch, its cotangents) → the gradient. Compiled once."""

    def scores(params: Any, batch: Any) -> Any:
        also = {"also": ("entropy",), "entropy_gradient": True}
        return scorer(folder).scores(params, batch, batch["weights"], **also)[0]

    def gradient(params: Any, batch: Any, cotangents: Any) -> Any:
        return jax.vjp(lambda params: scores(params, batch), params)[1](cotangents)[0]

    return jax.jit(scores), jax.jit(gradient)


@functools.cache
def of_reference(folder: Path) -> Any:
    return jax.jit(functools.partial(reference_logprobs(scorer(folder)), Frozen(None, read(folder))))


def named(tree: Any, model: Path, folder: Path) -> Tensors:
    """A tree like the parameters by the checkpoint's names."""
    hf_config = json.loads((model / "config.json").read_text())
    save_folder(folder, tree, decoder_config(hf_config), hf_config=hf_config, dtype=jnp.float32)
    return load_file(folder / "model.safetensors")


def batch_of(step: list[Tensors]) -> Tensors:
    """A step's microbatches [A, B, L] from what TRL's trainer saw: prompts padded on the left, answers on the right."""
    rows = [[_row(micro, i) for i in range(len(micro["prompt_ids"]))] for micro in step]
    return {
        name: np.array([[np.pad(row[name], (0, LENGTH - len(row[name]))) for row in micro] for micro in rows])
        for name in rows[0][0]
    }


def _row(micro: Tensors, i: int) -> Tensors:
    prompt = micro["prompt_ids"][i][micro["prompt_mask"][i] > 0]
    size = int((micro["completion_ids"][i] != 0).sum())  # what pads is no token that was drawn
    ids = np.concatenate([prompt, micro["completion_ids"][i][:size]]).astype(np.int32)
    own = slice(len(prompt) - 1, len(ids) - 1)

    def placed(values: Any) -> np.ndarray:
        found = np.zeros(len(ids), np.float32)
        found[own] = values
        return found

    row = {
        "tokens": ids,
        "targets": np.append(ids[1:], 0).astype(np.int32),
        "weights": placed(micro["completion_mask"][i][:size]),
        "segments": np.ones(len(ids), np.int32),
        "positions": np.arange(len(ids), dtype=np.int32),
        "advantages": placed(micro["advantages"][i]),
        "sampled_logprobs": placed(micro["sampling_per_token_logps"][i][:size]),
    }
    if "old_per_token_logps" in micro:
        row["old_logprobs"] = placed(micro["old_per_token_logps"][i][:size])
    return row


def relative(found: Tensors, expected: Tensors) -> float:
    """The norm of the difference over the norm, of all tensors together."""
    assert found.keys() == expected.keys()
    difference = sum(float(np.square(found[name] - value, dtype=np.float64).sum()) for name, value in expected.items())
    return float(np.sqrt(difference / sum(float(np.square(v, dtype=np.float64).sum()) for v in expected.values())))


@pytest.mark.parametrize(
    ("loss_type", "level", "option"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in GRID],
)
def test_loss_log_and_gradient_are_those_of_trl(loss_type, level, option, policy, tiny_chat_model, tmp_path):
    options = {"epsilon_high": 2.0} if loss_type == "cispo" else {}
    options |= OPTIONS[option]
    theirs = train(
        policy,
        tiny_chat_model,
        drift=0.2,
        num_iterations=2,
        loss_type=loss_type,
        importance_sampling_level=level,
        temperature=TEMPERATURE,
        **options,
    )
    how = setting(loss_type, level, options)
    batch = {name: jnp.asarray(value[0]) for name, value in batch_of(theirs.steps[0]).items()}
    reference = of_reference(tiny_chat_model)(batch) if how.has_reference else None
    scores, gradient = scores_and_gradient(policy)

    def objective(found: Any) -> Any:
        total, metrics = group_policy_loss(answers_of(found, batch, reference), how)
        return total.mean(), {name: each.mean_if_any() for name, each in metrics.items()}

    params = read(policy)
    (found, metrics), cotangents = jax.value_and_grad(objective, has_aux=True)(scores(params, batch))
    ours = named(gradient(params, batch, cotangents), policy, tmp_path / "gradient")
    assert relative(ours, theirs.gradient) < 1e-4
    np.testing.assert_allclose(float(found), theirs.loss[0], rtol=1e-4, atol=1e-6)
    assert_same_log({name: float(value) for name, value in metrics.items()}, theirs.log[0], options)


def assert_same_log(ours: dict[str, float], theirs: dict[str, float], options: dict[str, Any]) -> None:
    """Every number that the loss logs; the sampler's difference TRL logs only where it corrects for it."""
    always = ("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max")
    corrected = "vllm_importance_sampling_mode" in options
    assert set(ours) - set(theirs) == (set() if corrected else set(always))
    of_answers = ("completions/", "reward", "frac_")
    of_run = ("loss", "grad_norm", "learning_rate", "num_tokens", "epoch", "step", "step_time", "num_input_tokens_seen")
    rest = {name for name in set(theirs) - set(ours) if not name.startswith(of_answers) and name not in of_run}
    assert not rest
    for name in set(ours) & set(theirs):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-7, err_msg=name)


STEPS_OF = {  # options, microbatches of a step
    "dapo, two microbatches, reference": ({"beta": 0.3}, 2),
    "dapo, entropy": ({"entropy_coef": 0.1}, 1),
    "grpo, each generation twice": ({"loss_type": "grpo", "num_iterations": 2, "beta": 0.1}, 1),
    "dr_grpo, a generation in two": ({"loss_type": "dr_grpo", "steps_per_generation": 2, "scale_rewards": "none"}, 1),
    "luspo of answers, two microbatches": ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, 2),
    "bnpo": ({"loss_type": "bnpo", "scale_rewards": "batch"}, 1),
    "vespo, two microbatches": ({"loss_type": "vespo"}, 2),
}
QUICK_STEPS = "dapo, two microbatches, reference"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == QUICK_STEPS else [pytest.mark.slow]) for name in STEPS_OF]
)
def test_five_steps_are_those_of_trl(name, policy, tiny_chat_model, tmp_path):
    options, accumulation = STEPS_OF[name]
    theirs = train(
        policy,
        tiny_chat_model,
        steps=STEPS,
        gradient_accumulation_steps=accumulation,
        temperature=TEMPERATURE,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        **options,
    )
    loss, grad_norm, after = five_steps(policy, tiny_chat_model, theirs, options, tmp_path / "after")
    np.testing.assert_allclose(loss, theirs.loss, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(grad_norm, [entry["grad_norm"] for entry in theirs.log], rtol=1e-4)
    moved = {name: value - theirs.before[name] for name, value in theirs.after.items()}
    assert relative({name: value - theirs.before[name] for name, value in after.items()}, moved) < 1e-3


def five_steps(
    policy: Path, reference: Path, theirs: Run, options: dict[str, Any], folder: Path
) -> tuple[list[float], list[float], Tensors]:
    """Loss and gradient norm of each step by ours, and the last weights by the checkpoint's names."""
    options = {"loss_type": "dapo", **options}
    level = options.get("importance_sampling_level", "token")
    of_loss = {name: value for name, value in options.items() if name in ("beta", "entropy_coef")}
    loss = grpo_loss(scorer(policy), setting(options["loss_type"], level, of_loss))
    optimizer = optim.build(
        "adamw", schedule=lambda step: RATE, weight_decay=DECAY, betas=(0.9, 0.999), eps=1e-8, momentum=0.0
    )
    frozen = Frozen(None, read(reference) if "beta" in options else None)
    params, mesh = read(policy), make_mesh({}, devices=jax.devices()[:1])
    step = build_step(loss, optimizer, params, mesh=mesh, max_grad_norm=CLIP, frozen=frozen)
    state, found = step.init(params), []
    for seen in theirs.steps:
        state, metrics = step.train(state, frozen, device_batch(batch_of(seen), mesh))
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return [each[0] for each in found], [each[1] for each in found], named(state.params, policy, folder)
