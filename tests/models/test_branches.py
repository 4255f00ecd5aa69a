"""Branches of one beginning are the sequences they stand for: hidden states and gradients, in every attention."""

import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from models.config import Compute, DecoderConfig
from models.decoder import abstract_params, can_branch, hidden_states
from models.families import decoder_config
from models.sharding import paths
from tests.models.test_families import ABSENT, QUICK, TINY, VARIANTS, VOCABULARY, off

TWO = {"num_hidden_layers": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # a variant of each family, and what is changed in it
    "llama": ("plain", {}),
    "mistral": ("a window", {}),  # of 8 tokens: shorter than a branch
    "gemma2": ("caps", TWO),  # soft caps, with a window in one layer
    "gpt_oss": ("plain", TWO),  # sinks, a window, experts
    "gpt2": ("plain", {"n_positions": 512}),  # learned positions
    "smollm3": ("plain", {**TWO, "no_rope_layers": [1, 0]}),  # a layer that knows no positions
    "qwen3_moe": ("renormalised", {}),
}
DOCUMENTS = (  # of two rows; in each document the tokens of its beginning and of its branches
    ((7, (12, 3, 1)), (1, (2, 9))),
    ((11, (14,)), (3, (5, 5, 5))),
)


def config_of(kind: str, variant: str, **changes: Any) -> DecoderConfig:
    """A tiny model of a family."""
    sizes = {key: value for key, value in TINY.items() if key not in ABSENT.get(kind, ())}
    hf_config = CONFIG_MAPPING[kind](**(sizes | VARIANTS[kind][variant] | changes))
    return decoder_config(json.loads(hf_config.to_json_string()))


def drawn(config: DecoderConfig) -> Any:
    """Parameters at random: norms about the identity, or twice it, all else about zero."""
    random = np.random.default_rng(0)

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        about = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return (about + 0.15 * random.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, abstract_params(config, dtype=jnp.float32))


class Rows(NamedTuple):
    """Inputs [B, L], and for each token the weight of its hidden state in a sum, of which gradients are taken."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    branches: np.ndarray
    weights: np.ndarray


class Sequence(NamedTuple):
    """A beginning with one of its branches: its tokens, and where they stand in which row."""

    tokens: np.ndarray
    weights: np.ndarray
    row: int
    places: np.ndarray


def empty(count: int, length: int) -> Rows:
    return Rows(*np.zeros((4, count, length), np.int32), np.zeros((count, length), np.float32))


def laid(documents: Any, *, length: int) -> tuple[Rows, list[Sequence]]:
    """Rows of documents that part, and every sequence in them; a beginning has a weight in its first one alone."""
    random, rows, sequences = np.random.default_rng(1), empty(len(documents), length), []
    rows.tokens[:] = random.integers(1, VOCABULARY, rows.tokens.shape)
    rows.weights[:] = random.normal(size=rows.weights.shape)
    for row, each in enumerate(documents):
        at = 0
        for segment, (beginning, branches) in enumerate(each, start=1):
            shared, at = np.arange(at, at + beginning), at + beginning
            for number, size in enumerate(branches, start=1):
                own, at = np.arange(at, at + size), at + size
                places = np.concatenate([shared, own])
                rows.positions[row, places] = np.arange(beginning + size)
                rows.segments[row, places] = segment
                rows.branches[row, own] = number
                weights = rows.weights[row, places] * ((number == 1) | (np.arange(beginning + size) >= beginning))
                sequences.append(Sequence(rows.tokens[row, places], weights, row, places))
    rows.weights[rows.segments == 0] = 0
    return rows, sequences


def alone(sequences: list[Sequence], *, length: int) -> Rows:
    """Every sequence in a row of its own."""
    rows = empty(len(sequences), length)
    for row, each in enumerate(sequences):
        there = slice(len(each.tokens))
        rows.tokens[row, there], rows.weights[row, there] = each.tokens, each.weights
        rows.positions[row, there], rows.segments[row, there] = np.arange(len(each.tokens)), 1
    return rows


@functools.partial(jax.jit, static_argnums=(2, 3, 4), compiler_options=QUICK)
def run(params: Any, rows: Rows, config: DecoderConfig, compute: Compute, part: bool) -> tuple[jax.Array, Any]:
    """Hidden states [B, L, D], and the gradient of a weighted sum of what they are; not `part`, nothing branches."""

    def objective(params: Any) -> tuple[jax.Array, jax.Array]:
        hidden = hidden_states(
            params,
            config,
            tokens_BL=rows.tokens,
            positions_BL=rows.positions,
            segments_BL=rows.segments,
            branches_BL=rows.branches if part else None,
            compute=compute,
        )
        return (rows.weights[..., None] * jnp.sin(hidden)).sum(), hidden

    grads, hidden = jax.grad(objective, has_aux=True)(params)
    return hidden, grads


def assert_each_as_alone(config: DecoderConfig, documents: Any, *, length: int, reach: int, anew: bool = False) -> None:
    """Holds rows that part against their sequences alone: in rows of the same batch, all of branch 0, which takes one
    compilation; or, `anew`, in a batch that knows of no branches and no reach.
    """
    params, compute = drawn(config), Compute(longest_document=reach)
    rows, sequences = laid(documents, length=length)
    others = alone(sequences, length=length)
    both = Rows(*(np.concatenate(arrays) for arrays in zip(rows, others, strict=True)))
    first = np.arange(len(both.tokens))[:, None] < len(documents)
    hidden, grads = run(params, both._replace(weights=both.weights * first), config, compute, True)
    expected, expected_grads = (
        run(params, others, config, Compute(), False)
        if anew
        else run(params, both._replace(weights=both.weights * ~first), config, compute, True)
    )
    found = [np.asarray(hidden)[each.row, each.places] for each in sequences]
    apart = np.asarray(expected)[-len(sequences) :]
    wanted = [one[: len(each.tokens)] for one, each in zip(apart, sequences, strict=True)]
    assert off(np.concatenate(found), np.concatenate(wanted)) <= 1e-5
    theirs = paths(expected_grads)
    for path, leaf in paths(grads).items():
        scale = max(float(np.abs(theirs[path]).max()), 1e-3)
        assert float(np.abs(leaf - theirs[path]).max()) <= 1e-4 * scale, path


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k == "qwen3_moe")) for k in KINDS])
def test_each_branch_is_the_sequence_by_itself(kind):
    variant, changes = KINDS[kind]
    config = config_of(kind, variant, **changes)
    assert_each_as_alone(config, DOCUMENTS, length=48, reach=48, anew=kind == "mistral")


@pytest.mark.parametrize(
    ("kind", "documents", "reach"),
    [
        ("gemma2", [[(150, (260, 200))]], 610),
        pytest.param("gpt_oss", [[(150, (160, 40)), (100, (90, 99))]], 350, marks=pytest.mark.slow),
        pytest.param("gpt2", [[(5, (200, 200, 200))]], 605, marks=pytest.mark.slow),
    ],
)
def test_long_rows_are_computed_in_blocks_to_the_same_end(kind, documents, reach):
    variant, changes = KINDS[kind]
    assert_each_as_alone(config_of(kind, variant, **changes), documents, length=640, reach=reach, anew=True)


def test_a_model_whose_beginning_depends_on_what_follows_does_not_branch():
    parting = {(kind, name): can_branch(config_of(kind, name)) for kind in ("llama", "phi3") for name in VARIANTS[kind]}
    scaled = {("llama", "dynamic"), ("phi3", "longrope"), ("phi3", "short of longrope")}
    assert {case for case, parts in parting.items() if not parts} == scaled
