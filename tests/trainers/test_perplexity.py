"""Perplexity and bits per byte, by hand."""

import math

import jax.numpy as jnp
import pytest

from trainers.losses import Sum
from trainers.perplexity import text_measures


def sums(nats: float, tokens: float) -> dict[str, Sum]:
    return {"loss": Sum(jnp.float32(nats), jnp.float32(tokens))}


def test_a_guess_among_256_equal_bytes_has_perplexity_256_and_eight_bits_a_byte():
    found = text_measures(sums(10 * math.log(256), 10), text_bytes=10)
    assert found == {"perplexity": pytest.approx(256, rel=1e-6), "bits_per_byte": pytest.approx(8, rel=1e-6)}


def test_fewer_tokens_for_the_same_bytes_change_the_perplexity_and_not_the_bits():
    fine, coarse = (text_measures(sums(40.0, tokens), text_bytes=32) for tokens in (20, 10))
    assert coarse["perplexity"] == pytest.approx(fine["perplexity"] ** 2)
    assert coarse["bits_per_byte"] == fine["bits_per_byte"] == pytest.approx(40 / math.log(2) / 32)


def test_without_the_number_of_bytes_there_is_the_perplexity_alone():
    assert text_measures(sums(0.0, 5)) == {"perplexity": 1.0}


def test_a_loss_that_is_beyond_a_float_has_an_infinite_perplexity():
    assert text_measures(sums(1000.0, 1))["perplexity"] == math.inf
