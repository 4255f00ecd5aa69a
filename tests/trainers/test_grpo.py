"""A step on the policy's own answers is the same step however it is cut, and does what advantages say."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from input_pipeline.collate import collate
from input_pipeline.prompts import PromptRow
from models.config import Compute
from models.generate import Generated
from models.sharding import make_mesh
from tests.trainers.test_dpo import weights as parameters
from tests.trainers.test_step import CONFIG, MESHES
from trainers import optim
from trainers.grpo import answers_of, divergences, grpo_loss, policy_logprobs, reference_logprobs
from trainers.loop import device_batch
from trainers.policy_losses import GroupPolicy
from trainers.policy_verl import VerlPolicy
from trainers.reference import Frozen
from trainers.rollout import Answered, lines_of
from trainers.scoring import Scorer
from trainers.step import Step, TrainState, build_step

STEPS, ROWS, LENGTH = 4, 16, 24
SCORER = Scorer(CONFIG, Compute(), shared=False, temperature=0.8)
DAPO = GroupPolicy(loss_type="dapo", beta=0.1)
Host = dict[str, np.ndarray]


def batch(step: int, *, accumulation: int = 1, old: bool = True) -> Host:
    """Answers [A, B, L] of uneven lengths, one of them cut off and masked; the last two rows only fill the batch."""
    random = np.random.default_rng(step)
    names = ("tokens", "targets", "segments", "positions")
    of_answers = ("weights", "advantages", "sampled_logprobs", *(["old_logprobs"] if old else []))
    arrays = {name: np.zeros((ROWS, LENGTH), np.int32) for name in names}
    arrays |= {name: np.zeros((ROWS, LENGTH), np.float32) for name in of_answers}
    for row in range(ROWS - 2):
        prompt, answer = int(random.integers(1, 9)), int(random.integers(1, 13))
        size = prompt + answer
        tokens, own = random.integers(1, CONFIG.vocabulary, size), slice(prompt - 1, size - 1)
        arrays["tokens"][row, :size] = tokens
        arrays["targets"][row, : size - 1] = tokens[1:]
        arrays["segments"][row, :size] = 1
        arrays["positions"][row, :size] = np.arange(size)
        arrays["weights"][row, own] = row != 3
        arrays["advantages"][row, own] = random.normal()
        for name in of_answers[2:]:
            arrays[name][row, own] = random.normal(-4.5, 0.2, answer)
    return {name: array.reshape(accumulation, -1, LENGTH) for name, array in arrays.items()}


@functools.cache
def built(how: GroupPolicy | VerlPolicy, mesh: str) -> Step:
    optimizer = optim.build(
        "adamw", schedule=lambda step: 3e-3, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8, momentum=0.0
    )
    params = parameters(0)
    frozen = Frozen(None, params if how.has_reference else None)
    return build_step(grpo_loss(SCORER, how), optimizer, params, mesh=made(mesh), max_grad_norm=1.0, frozen=frozen)


def made(mesh: str) -> jax.sharding.Mesh:
    sizes = MESHES[mesh]
    return make_mesh(sizes, devices=jax.devices()[: math.prod(sizes.values())])


def begun(step: Step, *, reference: int | None) -> tuple[TrainState, Frozen]:
    """The first state, and the reference: parameters of that number, if any."""
    params = jax.device_put(parameters(0), step.shardings.params)
    other = None if reference is None else jax.device_put(parameters(reference), step.shardings.params)
    return step.init(params), Frozen(None, other)


def trajectory(how: Any, mesh: str, *, accumulation: int) -> tuple[np.ndarray, Any]:
    """Loss, gradient norm and the sampler's difference of STEPS steps, and the last parameters."""
    step = built(how, mesh)
    (state, frozen), found = begun(step, reference=1 if how.has_reference else None), []
    for number in range(STEPS):
        state, metrics = step.train(state, frozen, device_batch(batch(number, accumulation=accumulation), made(mesh)))
        found.append([float(metrics[name]) for name in ("loss", "grad_norm", "sampling/sampling_logp_difference/mean")])
    return np.array(found), jax.device_get(state.params)


@functools.cache
def plain() -> tuple[np.ndarray, Any]:
    return trajectory(DAPO, "one device", accumulation=1)


CUTS = [(mesh, accumulation) for mesh in MESHES for accumulation in (1, 2)][1:]


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "accumulation"), CUTS)
def test_steps_are_the_same_on_every_mesh_and_accumulation(mesh, accumulation):
    found, params = trajectory(DAPO, mesh, accumulation=accumulation)
    np.testing.assert_allclose(found, plain()[0], rtol=2e-5, atol=1e-6)
    # A hundredth of one update: AdamW's first ones divide small gradients by themselves.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), params, plain()[1])


def test_what_is_logged_is_the_same_on_many_devices_in_two_microbatches():
    found = []
    for mesh, accumulation in (("one device", 1), ("fsdp 4 × tensor 2", 2)):
        step = built(DAPO, mesh)
        state, frozen = begun(step, reference=1)
        sums = step.evaluate(state.params, frozen, device_batch(batch(0, accumulation=accumulation), made(mesh)))
        of_calls = ("clip_ratio/low_min", "clip_ratio/high_max", "sampling/sampling_logp_difference/max")
        found.append({name: float(each.mean()) for name, each in sums.items() if name not in of_calls})
    assert found[0].keys() >= {"loss", "kl", "entropy", "clip_ratio/low_mean", "sampling/sampling_logp_difference/mean"}
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-7)


def groups(count: int, answers: int) -> list[Answered]:
    """Groups of answers of uneven lengths, some of them cut off."""
    random = np.random.default_rng(4)
    found = []
    for number in range(count):
        prompt = tuple(map(int, random.integers(1, CONFIG.vocabulary, random.integers(1, 9))))
        made = []
        for _ in range(answers):
            ids = list(map(int, random.integers(1, CONFIG.vocabulary, random.integers(1, 7))))
            logprobs = random.normal(-4.5, 0.2, len(ids)).astype(np.float32)
            made.append(Generated(ids, str(random.choice(["stop", "length"])), ids, logprobs, None))
        row = PromptRow(prompt, "", {}, number, "")
        found.append(Answered(row, tuple(made), ("",) * answers, np.zeros((answers, 1)), random.normal(size=answers)))
    return found


@pytest.mark.parametrize(
    "how",
    [
        DAPO,
        GroupPolicy(loss_type="grpo", importance_sampling_level="sequence"),
        VerlPolicy(use_kl_loss=True, entropy_coeff=0.01),
    ],
    ids=["dapo", "gspo", "verl"],
)
def test_answers_behind_one_copy_of_their_prompt_teach_what_they_teach_each_behind_its_own(how):
    def run(together: int) -> Any:
        lines = [line for one in groups(3, 4) for line in lines_of(one, mask_truncated=True, together=together)]
        length = max(len(line.columns) for line in lines)
        host = collate(lines, accumulation=1, rows=len(lines) + 1, length=length)  # one row only fills the batch
        loss = grpo_loss(SCORER._replace(shared=together > 1), how, together=together)
        frozen = Frozen(None, parameters(1))

        def objective(params: Any) -> Any:
            total, metrics = loss(params, frozen, first(host))
            return total.mean(), {name: each.mean() for name, each in metrics.items()}

        return jax.jit(jax.value_and_grad(objective, has_aux=True))(parameters(0))

    (alone, metrics), gradients = run(1)
    (shared, same), others = run(2)
    assert float(shared) == pytest.approx(float(alone), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), metrics, same)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), gradients, others)


def first(host: Host) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array[0]) for name, array in host.items()}


def scores(host: Host) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    shape = host["weights"][0].shape
    return {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name in ("logprob", "entropy")}


def test_what_stands_where_nothing_is_learned_from_does_not_matter():
    host = batch(0)
    spoiled = {
        name: np.where(host["weights"] > 0, array, np.nan)
        if name in ("advantages", "sampled_logprobs", "old_logprobs")
        else array
        for name, array in host.items()
    }
    nan = jnp.full((ROWS, LENGTH), jnp.nan)
    found = {name: jnp.where(host["weights"][0] > 0, x, nan) for name, x in scores(host).items()}
    x = answers_of(found, first(spoiled), nan * host["weights"][0])
    jax.tree.map(np.testing.assert_array_equal, x._replace(reference=None), answers_of(scores(host), first(host), None))
    assert x.live.tolist() == [1.0] * (ROWS - 2) + [0.0] * 2
    assert x.weights[3].sum() == 0


def test_without_log_probabilities_of_before_the_policy_is_the_one_that_answered():
    x = answers_of(scores(batch(0)), first(batch(0, old=False)), None)
    np.testing.assert_array_equal(x.old, x.logprob)

    def old(logprob: jax.Array) -> jax.Array:
        return answers_of(scores(batch(0)) | {"logprob": logprob}, first(batch(0, old=False)), None).old.sum()

    assert not jax.grad(old)(x.logprob).any()


@pytest.mark.slow
@pytest.mark.parametrize("how", [DAPO, VerlPolicy(use_kl_loss=True, entropy_coeff=0.01)], ids=["trl", "verl"])
def test_a_reference_and_a_policy_of_before_may_be_known_or_computed(how):
    def run(frozen: Frozen, micro: dict[str, jax.Array]) -> Any:
        loss = grpo_loss(SCORER, how)
        return jax.jit(jax.value_and_grad(lambda params: loss(params, frozen, micro)[0].mean()))(parameters(0))

    frozen, micro = Frozen(None, parameters(1)), first(batch(0, old=False))
    known = {
        "reference": reference_logprobs(SCORER)(frozen, micro),
        "old_logprobs": policy_logprobs(SCORER)(parameters(0), frozen, micro),
    }
    found, expected = run(Frozen(None, None), micro | known), run(frozen, micro)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


@pytest.mark.slow
def test_answers_of_an_advantage_above_zero_become_likelier_and_the_others_less_so():
    step, mesh = built(DAPO, "one device"), made("one device")
    state, frozen = begun(step, reference=0)
    score = jax.jit(policy_logprobs(SCORER))
    host = batch(0)
    host["old_logprobs"] = before = np.asarray(score(parameters(0), frozen, first(host)))[None]
    for _ in range(STEPS):
        state, _ = step.train(state, frozen, device_batch(host, mesh))
    gained = (np.asarray(score(state.params, frozen, first(host))) - before[0]).sum(axis=1)
    learned = host["weights"][0].any(axis=1)
    wanted = host["advantages"][0].sum(axis=1)[learned] > 0
    assert gained[learned][wanted].min() > 0 > gained[learned][~wanted].mean()


def test_the_divergence_of_an_answer_is_the_sum_over_its_tokens_for_rewards_and_their_mean_for_its_weight():
    old, reference = jnp.array([[-1.0, -2.0, 9.0]]), jnp.array([[-1.5, -1.0, 9.5]])
    total, mean = divergences(old, reference, jnp.array([[1.0, 1.0, 0.0]]), kind="kl")
    np.testing.assert_allclose(total, [-0.5])
    np.testing.assert_allclose(mean, [-0.25])
