"""A step of preference learning is the same step however it is cut: prompts once or twice, on every mesh and
accumulation, with a reference computed or known; a reference that moves does so by its formula.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from input_pipeline.collate import collate
from input_pipeline.pairs import OTHERS, Answer, answers_line
from models.config import Compute
from models.decoder import abstract_params
from models.sharding import make_mesh
from tests.trainers.test_step import CONFIG, MESHES
from trainers import optim
from trainers.dpo import CHOSEN, REJECTED, dpo_loss
from trainers.kto import UNWANTED, WANTED, partners, unpaired_loss
from trainers.loop import device_batch
from trainers.pair_losses import Preference
from trainers.reference import Frozen, Sync, moved
from trainers.scoring import Scorer, reference_logprobs
from trainers.step import Loss, Step, TrainState, build_step

STEPS, ROWS, LENGTH = 10, 16, 40
Known = np.ndarray | None  # a reference's log-probabilities of each row's answers


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


class Way(NamedTuple):
    """How a run is cut."""

    mesh: str = "one device"
    accumulation: int = 1
    shared: bool = True

    def made(self) -> jax.sharding.Mesh:
        sizes = MESHES[self.mesh]
        return make_mesh(sizes, devices=jax.devices()[: math.prod(sizes.values())])


def drawn(step: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A prompt and two answers for each row, of uneven lengths: two prompts are of one token, some answers too."""
    random = np.random.default_rng(step)
    sizes = np.stack([random.integers(1, 9, ROWS), random.integers(1, 13, ROWS), random.integers(1, 9, ROWS)], axis=1)
    sizes[:2, 0] = 1
    return [tuple(random.integers(1, CONFIG.vocabulary, n).astype(np.int32) for n in each) for each in sizes]


def pairs(step: int, *, accumulation: int = 1, shared: bool = True, known: Known = None, live: int = ROWS) -> Any:
    """A batch [A, B, L] of pairs, of which the first `live` are there."""
    lines = [
        answers_line(
            prompt,
            [Answer(chosen, CHOSEN), Answer(rejected, REJECTED)],
            row=row,
            shared=shared,
            reference=None if known is None else known[row],
        )
        for row, (prompt, chosen, rejected) in enumerate(drawn(step)[:live])
    ]
    return collate(lines, accumulation=accumulation, rows=ROWS // accumulation, length=LENGTH)


def singles(step: int, *, accumulation: int = 1, shared: bool = True, known: Known = None, live: int = ROWS) -> Any:
    """A batch [A, B, L] of single answers, two of three wanted, each beside another row's."""
    found, lines = drawn(step)[:live], []
    for row, other in enumerate(partners(live, block=8)):
        prompt, own, _ = found[row]
        answers = [Answer(own, UNWANTED if row % 3 == 0 else WANTED), Answer(found[other][1], OTHERS)]
        given = None if known is None else known[row]
        lines.append(answers_line(prompt, answers, row=row, shared=shared, reference=given))
    return collate(lines, accumulation=accumulation, rows=ROWS // accumulation, length=LENGTH)


def scorer(*, shared: bool) -> Scorer:
    return Scorer(CONFIG, Compute(), shared=shared)


def sigmoid(*, shared: bool) -> Loss:
    return dpo_loss(scorer(shared=shared), Preference(("sigmoid",), beta=0.1))


def kto(*, shared: bool) -> Loss:
    return unpaired_loss(scorer(shared=shared), loss_type="kto", beta=0.1)


def weights(seed: int) -> Any:
    """Parameters at random: norms about the identity, all else about zero."""
    random = np.random.default_rng(seed)

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        about = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return (about + 0.1 * random.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, abstract_params(CONFIG, dtype=jnp.float32))


def built(loss: Loss, mesh: jax.sharding.Mesh, *, sync: Sync | None = None) -> Step:
    optimizer = optim.build(
        "adamw", schedule=lambda step: 3e-3, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8, momentum=0.0
    )
    abstract = abstract_params(CONFIG, dtype=jnp.float32)
    frozen = Frozen(None, None if sync else abstract)
    return build_step(loss, optimizer, abstract, mesh=mesh, max_grad_norm=1.0, frozen=frozen, sync=sync)


def begun(step: Step) -> tuple[TrainState, Frozen]:
    """The state before the first step, and the reference: the same weights."""
    params, reference = (jax.device_put(weights(0), step.shardings.params) for _ in range(2))
    return step.init(params), Frozen(None, None if step.shardings.reference else reference)


def trajectory(step: Step, batch: Any, way: Way, *, names: tuple[str, ...]) -> tuple[np.ndarray, Any]:
    """What is logged of STEPS steps, [steps, names], and the last parameters."""
    mesh = way.made()
    state, frozen = begun(step)
    found = []
    for number in range(STEPS):
        host = batch(number, accumulation=way.accumulation, shared=way.shared)
        state, metrics = step.train(state, frozen, device_batch(host, mesh))
        found.append([float(metrics[name]) for name in names])
    return np.array(found), jax.device_get(state.params)


NAMES = ("loss", "grad_norm", "rewards/margins")


@functools.cache
def of_one_device() -> Step:
    return built(sigmoid(shared=True), Way().made())


@functools.cache
def plain() -> tuple[np.ndarray, Any]:
    return trajectory(of_one_device(), pairs, Way(), names=NAMES)


def assert_same_run(found: tuple[np.ndarray, Any], expected: tuple[np.ndarray, Any]) -> None:
    # Margins and KL are 0.1 times the difference of two sums of about -50, each known to 5e-6.
    np.testing.assert_allclose(found[0][:, :2], expected[0][:, :2], rtol=1e-5)
    np.testing.assert_allclose(found[0][:, 2], expected[0][:, 2], rtol=1e-5, atol=1e-5)
    # A hundredth of one update: AdamW's first ones divide small gradients by themselves.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), found[1], expected[1])


QUICK = Way("fsdp 4 × tensor 2", accumulation=2, shared=False)
OTHER_WAYS = [Way(mesh, accumulation, shared) for mesh in MESHES for accumulation in (1, 2) for shared in (True, False)]


@pytest.mark.parametrize(
    "way",
    [QUICK, *(slow(way) for way in OTHER_WAYS if way not in (QUICK, Way()))],
    ids=lambda way: f"{way.mesh}, {way.accumulation}, {'shared' if way.shared else 'apart'}",
)
def test_ten_steps_are_the_same_on_every_mesh_and_accumulation_shared_and_apart(way):
    assert_same_run(trajectory(built(sigmoid(shared=way.shared), way.made()), pairs, way, names=NAMES), plain())


def test_the_first_loss_is_the_logarithm_of_two_and_margins_of_the_same_pairs_grow():
    step = of_one_device()
    state, frozen = begun(step)
    log = []
    for _ in range(4):
        state, metrics = step.train(state, frozen, device_batch(pairs(0), Way().made()))
        log.append((float(metrics["loss"]), float(metrics["rewards/margins"])))
    assert np.float32(log[0][0]) == np.float32(math.log(2))
    assert [margin for _, margin in log] == sorted(margin for _, margin in log)
    assert log[0][1] == 0.0 < 0.1 < log[-1][1]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("mesh", ["fsdp 8", "data 2 × fsdp 2 × tensor 2", "fsdp 2 × tensor 2 × context 2"])
def test_ten_steps_of_kto_are_the_same_on_every_mesh_shared_and_apart(mesh, shared, kto_plain):
    way = Way(mesh, accumulation=2, shared=shared)
    found = trajectory(built(kto(shared=shared), way.made()), singles, way, names=("loss", "grad_norm", "kl"))
    assert_same_run(found, kto_plain)


@pytest.fixture(scope="module")
def kto_plain() -> tuple[np.ndarray, Any]:
    """With two microbatches, too: each estimates a KL of its own."""
    way = Way(accumulation=2)
    return trajectory(built(kto(shared=True), way.made()), singles, way, names=("loss", "grad_norm", "kl"))


def test_rows_that_only_fill_a_batch_count_nothing():
    """Eleven pairs in sixteen rows are those eleven, in a step and in evaluation."""
    step, mesh = of_one_device(), Way().made()
    state, frozen = begun(step)
    state, metrics = step.train(state, frozen, device_batch(pairs(0, live=11), mesh))
    sums = step.evaluate(state.params, frozen, device_batch(pairs(1, live=11), mesh))
    assert float(sums["loss"].count) == float(sums["rewards/accuracies"].count) == 11
    others = [step.evaluate(state.params, frozen, device_batch(pairs(1, live=n), mesh)) for n in (5, ROWS)]
    assert [float(each["loss"].count) for each in others] == [5, ROWS]
    totals = [float(each["loss"].total) for each in (others[0], sums, others[1])]
    assert totals == sorted(totals)  # a loss is positive, and the rows are the same
    assert np.float32(metrics["loss"]) == pytest.approx(math.log(2), rel=1e-7)
    assert all(np.isfinite(float(value)) for value in metrics.values())


LOSSES = {
    "sigmoid": lambda scorer: dpo_loss(scorer, Preference(("sigmoid",), beta=0.1)),
    "desensitised, weighted": lambda scorer: dpo_loss(
        scorer, Preference(("sigmoid", "sft"), beta=0.1, use_weighting=True), ld_alpha=0.3
    ),
    "orpo": lambda scorer: dpo_loss(scorer, Preference(("orpo",), beta=0.1, nll_weight=1.0)),
    "kto": lambda scorer: unpaired_loss(scorer, loss_type="kto", beta=0.1),
    "apo": lambda scorer: unpaired_loss(scorer, loss_type="apo_zero_unpaired", beta=0.1, undesirable_weight=2.0),
}
QUICK_LOSSES = ("kto",)
BATCHES = {name: singles if name in ("kto", "apo") else pairs for name in LOSSES}


def judged(name: str, batch: Any, *, shared: bool) -> Any:
    """The loss and what is logged of a batch [1, B, L], by a policy that is not the reference."""
    run = jax.jit(LOSSES[name](scorer(shared=shared)))
    return run(weights(0), Frozen(None, weights(1)), {key: value[0] for key, value in batch.items()})


def assert_same_sums(found: Any, expected: Any) -> None:
    assert found[1].keys() == expected[1].keys()
    for name, (total, count) in {"loss": expected[0], **expected[1]}.items():
        got = {"loss": found[0], **found[1]}[name]
        np.testing.assert_allclose(got.total, total, rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(got.count, count, rtol=0, err_msg=name)


@pytest.mark.parametrize("name", [name if name in QUICK_LOSSES else slow(name) for name in LOSSES])
def test_loss_and_metrics_are_the_same_shared_and_apart(name):
    found, expected = (judged(name, BATCHES[name](3, shared=shared), shared=shared) for shared in (True, False))
    assert_same_sums(found, expected)
    assert abs(float(expected[0].mean()) - math.log(2)) > 1e-3  # no two models that agree


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_same_shared_and_apart(name):
    def gradient(shared: bool) -> Any:
        loss, batch = LOSSES[name](scorer(shared=shared)), BATCHES[name](3, shared=shared)
        micro = {key: value[0] for key, value in batch.items()}
        frozen = Frozen(None, weights(1))
        return jax.jit(jax.grad(lambda params: loss(params, frozen, micro)[0].total))(weights(0))

    def assert_close(one: jax.Array, other: jax.Array) -> None:
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * float(jnp.abs(other).max()) + 1e-6)

    jax.tree.map(assert_close, gradient(True), gradient(False))


@pytest.mark.parametrize(
    ("name", "numbers", "ld_alpha"),
    [
        slow("sigmoid", (CHOSEN, REJECTED), None),
        slow("desensitised, weighted", (CHOSEN, REJECTED), 0.3),
        ("kto", (WANTED, UNWANTED, OTHERS), None),
    ],
)
def test_a_reference_known_beforehand_is_the_one_that_is_computed(name, numbers, ld_alpha):
    make, frozen = BATCHES[name], Frozen(None, weights(1))
    batch = {key: value[0] for key, value in make(3, live=13).items()}
    compute = jax.jit(reference_logprobs(scorer(shared=True), numbers=numbers, ld_alpha=ld_alpha))
    known = np.asarray(compute(frozen, batch))
    assert not known[13:].any()
    if name == "kto":  # an answer is of one kind, and of the other there is none
        known = np.stack([known[:, 0] + known[:, 1], known[:, 2]], axis=1)
    found = judged(name, make(3, live=13, known=known), shared=True)
    expected = judged(name, make(3, live=13), shared=True)
    np.testing.assert_allclose(found[0].mean(), expected[0].mean(), rtol=1e-6)
    assert_same_sums(found, expected)


def test_a_reference_that_moves_is_that_of_its_formula_and_stands_where_training_halts():
    mesh, sync = Way().made(), Sync(every=2, share=0.6)
    step = built(sigmoid(shared=True), mesh, sync=sync)
    state, frozen = begun(step)
    reference, losses = jax.device_get(state.params), []
    for number in range(1, 6):
        state, metrics = step.train(state, frozen, device_batch(pairs(number - 1), mesh))
        losses.append(float(metrics["loss"]))
        policy, now = jax.device_get((state.params, state.reference))
        if number % 2 == 0:
            reference = jax.tree.map(lambda old, new: (1 - 0.6) * old + 0.6 * new, reference, policy)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), now, reference)
    np.testing.assert_allclose(losses[:2], plain()[0][:2, 0], rtol=1e-5)
    assert abs(losses[2] - plain()[0][2, 0]) > 1e-4  # from the third step on there is less to tell apart
    poisoned = pairs(6)
    poisoned["weights"][0, 0] = np.inf
    state, metrics = step.train(state, frozen, device_batch(poisoned, mesh))
    assert bool(metrics["halted"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.reference), now)


@pytest.mark.parametrize("ok", [True, False])
def test_a_reference_that_moves_every_step_does_not_in_one_that_changed_nothing(ok):
    old, new = {"a": jnp.array([1.0])}, {"a": jnp.array([3.0])}
    found = moved(old, new, Sync(every=1, share=0.5), step=jnp.int32(1), ok=jnp.array(ok))
    assert float(found["a"][0]) == (2.0 if ok else 1.0)
