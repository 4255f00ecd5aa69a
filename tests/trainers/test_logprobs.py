"""Log-probabilities in chunks against log_softmax of all logits at once: values, gradients, memory, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models.sharding import make_mesh
from trainers.logprobs import ALSO, row_means, row_sums, token_logprobs, token_scores


def made(seed: int, B: int, L: int, D: int = 8, V: int = 16, wanted: float = 0.5):
    random = np.random.default_rng(seed)
    return (
        random.standard_normal((B, L, D)).astype(np.float32),
        random.standard_normal((V, D)).astype(np.float32),
        random.standard_normal(V).astype(np.float32),
        random.integers(0, V, (B, L)).astype(np.int32),
        (random.random((B, L)) < wanted).astype(np.float32),
        random.standard_normal((B, L)).astype(np.float32),  # how much each token's log-probability matters
    )


def logits_of(hidden, head, bias, softcap):
    logits = jnp.einsum("bld,vd->blv", hidden, head)
    logits = logits if bias is None else logits + bias[None, None, :]
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def plain(hidden, head, bias, targets, *, softcap=None, temperature=1.0):
    """The formula as written, with all logits at once."""
    log_p = jax.nn.log_softmax(logits_of(hidden, head, bias, softcap) / temperature)
    return jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


def test_a_logit_of_one_and_one_of_zero_by_hand():
    # log p(first) = -log(1 + 1/e), log p(second) = -1 - log(1 + 1/e)
    hidden, head = jnp.array([[[1.0], [1.0]]]), jnp.array([[1.0], [0.0]])
    found = token_scores(hidden, head, jnp.array([[0, 1]]), also=("mean_logit", "correct"))
    assert set(found) == {"logprob", "mean_logit", "correct"}
    np.testing.assert_allclose(found["logprob"], [[-np.log1p(np.exp(-1)), -1 - np.log1p(np.exp(-1))]], rtol=1e-6)
    np.testing.assert_array_equal(found["mean_logit"], [[0.5, 0.5]])
    np.testing.assert_array_equal(found["correct"], [[1, 0]])


@given(
    seed=st.integers(0, 1000),
    B=st.integers(1, 3),
    L=st.integers(1, 9),
    chunk=st.sampled_from([1, 3, 4, 1024]),
    softcap=st.sampled_from([None, 3.0]),
    biased=st.booleans(),
    wanted=st.sampled_from([None, 0.0, 0.3, 1.0]),
    temperature=st.sampled_from([1.0, 0.7]),
)
@settings(max_examples=12, deadline=None)
def test_chunks_give_log_softmax_and_its_gradients(seed, B, L, chunk, softcap, biased, wanted, temperature):
    hidden, head, bias, targets, weights, matter = made(seed, B, L, wanted=wanted or 0.0)
    bias = bias if biased else None
    kept = np.ones_like(weights) if wanted is None else weights

    def ours(hidden, head, bias):
        found = token_logprobs(
            hidden,
            head,
            targets,
            bias_V=bias,
            softcap=softcap,
            temperature=temperature,
            chunk=chunk,
            weights_BL=None if wanted is None else weights,
        )
        return (found * matter).sum(), found

    def theirs(hidden, head, bias):
        found = plain(hidden, head, bias, targets, softcap=softcap, temperature=temperature) * kept
        return (found * matter).sum(), found

    both = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)) for f in (ours, theirs))
    ((_, value), grads), ((_, expected), wanted_grads) = (run(hidden, head, bias) for run in both)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def test_what_is_logged_beside_them_is_that_of_all_logits_and_has_no_gradient():
    hidden, head, bias, targets, weights, _ = made(1, 3, 7)
    logits = logits_of(hidden, head, bias, 5.0)
    p = jax.nn.softmax(logits)
    expected = {
        "entropy": -(p * jnp.log(p)).sum(-1),
        "mean_logit": logits.mean(-1),
        "correct": (logits.argmax(-1) == targets).astype(jnp.float32),
        "log_sum_squares": jnp.log((p * p).sum(-1)),
    }

    def scores(hidden):
        return token_scores(hidden, head, targets, also=ALSO, weights_BL=weights, bias_V=bias, softcap=5.0, chunk=6)

    found = scores(hidden)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value * weights, rtol=1e-5, atol=1e-5, err_msg=name)
    gradient = jax.grad(lambda hidden: sum(scores(hidden)[name].sum() for name in ALSO))(hidden)
    assert not np.any(gradient)


@pytest.mark.parametrize("both", [True, False])
def test_the_entropy_has_its_gradient_where_it_is_asked_for_at_a_temperature(both):
    hidden, head, bias, targets, weights, matter = made(2, 3, 7)
    how = {"also": ("entropy",), "entropy_gradient": True, "temperature": 0.7, "weights_BL": weights, "chunk": 6}

    def ours(hidden, head, bias):
        found = token_scores(hidden, head, targets, bias_V=bias, softcap=5.0, **how)
        return (found["entropy"] * matter[::-1]).sum() + (found["logprob"] * matter).sum() * both

    def theirs(hidden, head, bias):
        log_p = jax.nn.log_softmax(logits_of(hidden, head, bias, 5.0) / 0.7)
        entropy = -(jnp.exp(log_p) * log_p).sum(-1)
        logprob = plain(hidden, head, bias, targets, softcap=5.0, temperature=0.7)
        return (entropy * matter[::-1] * weights).sum() + (logprob * matter * weights).sum() * both

    value, grads = jax.value_and_grad(ours, argnums=(0, 1, 2))(hidden, head, bias)
    expected, wanted = jax.value_and_grad(theirs, argnums=(0, 1, 2))(hidden, head, bias)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="also=\\['rank'\\]: allowed are entropy, mean_logit"):
        token_scores(jnp.zeros((1, 1, 2)), jnp.zeros((3, 2)), jnp.zeros((1, 1), int), also=("rank",))


def test_logits_of_ten_thousand_stay_finite_also_beside_tokens_that_are_not_wanted():
    hidden, head = jnp.full((1, 3, 1), 100.0), jnp.array([[100.0], [-100.0]])
    weights = jnp.array([[1.0, 0.0, 1.0]])

    def total(hidden, head):
        found = token_logprobs(hidden, head, jnp.array([[0, 1, 1]]), weights_BL=weights)
        return found.sum(), found

    (_, found), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, head)
    np.testing.assert_array_equal(found, [[0.0, 0.0, -20000.0]])
    assert all(np.isfinite(g).all() for g in grads)
    assert not grads[0][0, 1].any()


def test_narrow_hidden_states_meet_float32_logits_and_a_float32_gradient_of_the_head():
    hidden, head, _, targets, _, matter = made(3, 2, 8)
    narrow = jnp.asarray(hidden, jnp.bfloat16)
    wide = jnp.asarray(narrow, jnp.float32)
    head = np.asarray(jnp.asarray(head, jnp.bfloat16), np.float32)

    def ours(hidden, head):
        return (token_logprobs(hidden, head, targets, chunk=4) * matter).sum()

    grads = jax.grad(ours, argnums=(0, 1))(narrow, head)
    assert (grads[0].dtype, grads[1].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(token_logprobs(narrow, head, targets), plain(wide, head, None, targets), atol=1e-5)
    expected = jax.grad(lambda head: (plain(wide, head, None, targets) * matter).sum())(head)
    np.testing.assert_allclose(grads[1], expected, atol=3e-2)


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2, "context": 2}]
)
def test_they_are_the_same_on_every_mesh(sizes):
    hidden, head, bias, targets, weights, matter = made(5, 8, 12)
    mesh = make_mesh(sizes)
    rows = NamedSharding(mesh, P(("data", "fsdp", "expert"), "context"))

    def ours(hidden, head, bias, targets, weights, matter):
        found = token_logprobs(hidden, head, targets, weights_BL=weights, bias_V=bias, chunk=24)
        return (found * matter).sum(), found

    def theirs(hidden, head, bias):
        found = plain(hidden, head, bias, targets) * weights
        return (found * matter).sum(), found

    placed = (
        jax.device_put(hidden, rows),
        jax.device_put(head, NamedSharding(mesh, P("tensor", "fsdp"))),
        jax.device_put(bias, NamedSharding(mesh, P())),
        *(jax.device_put(x, rows) for x in (targets, weights, matter)),
    )
    with jax.set_mesh(mesh):
        (_, value), grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2), has_aux=True))(*placed)
    (_, expected), wanted = jax.value_and_grad(theirs, argnums=(0, 1, 2), has_aux=True)(hidden, head, bias)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def test_memory_does_not_grow_with_the_vocabulary_times_the_length():
    D, V, chunk = 4, 8192, 64

    def temporary(L: int) -> int:
        def loss(hidden, head, targets):
            return token_logprobs(hidden, head, targets, chunk=chunk).sum()

        shapes = (
            jax.ShapeDtypeStruct((1, L, D), jnp.float32),
            jax.ShapeDtypeStruct((V, D), jnp.float32),
            jax.ShapeDtypeStruct((1, L), jnp.int32),
        )
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(256), temporary(4096)
    assert short < 8 * chunk * V * 4  # a few times the logits of one chunk
    assert long - short < (4096 - 256) * V * 4 / 100  # what the logits of the others would take: 126 MB


def test_a_head_that_is_not_trained_costs_no_product_in_the_backward_pass():
    hidden, head, _, targets, _, _ = made(7, 1, 8)

    def products(argnums) -> int:
        loss = jax.grad(lambda hidden, head: token_logprobs(hidden, head, targets).sum(), argnums=argnums)
        return str(jax.make_jaxpr(loss)(hidden, head)).count("dot_general")

    assert (products(0), products((0, 1))) == (3, 4)


@pytest.mark.parametrize("trained", [True, False])
def test_gradients_add_up_over_microbatches_as_the_step_adds_them(trained):
    hidden, head, _, targets, weights, matter = made(11, 4, 6)

    def one(hidden, head, targets, weights, matter):
        return (token_logprobs(hidden, head, targets, weights_BL=weights, chunk=8) * matter).sum()

    def accumulated(scale, head):
        def add(total, micro):
            hidden, *rest = (x[None] for x in micro)
            return total + jax.grad(lambda at, h: one(hidden * at, h, *rest), argnums=int(trained))(scale, head), None

        start = jnp.zeros_like(head) if trained else jnp.zeros(())
        return jax.lax.scan(add, start, (hidden, targets, weights, matter))[0]

    expected = jax.grad(
        lambda at, h: (plain(hidden * at, h, None, targets) * weights * matter).sum(), argnums=int(trained)
    )(1.0, head)
    np.testing.assert_allclose(jax.jit(accumulated)(1.0, head), expected, rtol=1e-4, atol=2e-5)


def test_sums_and_means_of_rows_and_of_segments_by_hand():
    values = jnp.array([[1.0, 2.0, 4.0, jnp.nan], [8.0, 16.0, 32.0, 64.0]])
    weights = jnp.array([[1.0, 0.5, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]])
    segments = jnp.array([[1, 1, 2, 0], [1, 2, 2, 2]])
    np.testing.assert_array_equal(row_sums(values, weights), [6.0, 112.0])
    np.testing.assert_allclose(row_means(values, weights), [2.4, 112 / 3], rtol=1e-6)
    by_segment = {"segments_BL": segments, "segments": 3}
    np.testing.assert_array_equal(row_sums(values, weights, **by_segment), [[2.0, 4.0, 0.0], [0.0, 112.0, 0.0]])
    np.testing.assert_allclose(
        row_means(values, weights, **by_segment), [[4 / 3, 4.0, 0.0], [0.0, 112 / 3, 0.0]], rtol=1e-6
    )
    gradient = jax.grad(lambda values: row_sums(values, weights).sum())(values)
    np.testing.assert_array_equal(gradient, weights)
