"""The load-balancing loss of a mixture of experts joins the training loss as in transformers."""

import json

import jax
import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from models.config import Compute
from models.families import decoder_config
from models.sharding import paths
from models.weights import load_params
from trainers.sft import cross_entropy_alone, sft_loss

ROUTER = "layers/moe/router/kernel"


@pytest.mark.parametrize("asked", [True, False])
def test_loss_and_the_routers_gradient_are_those_of_transformers(asked, tmp_path):
    torch.manual_seed(0)
    hf_config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        initializer_range=0.3,
        output_router_logits=asked,
        router_aux_loss_coef=0.7,
    )
    reference = MixtralForCausalLM(hf_config).eval()
    reference.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 64, (2, 12)).astype(np.int32)
    ids = torch.tensor(tokens, dtype=torch.long)
    expected = reference(ids, labels=ids).loss
    expected.backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.grad)
    reference.save_pretrained(tmp_path / "grads")

    config = decoder_config(json.loads((tmp_path / "config.json").read_text()))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params, grads = (
        load_params(folder, config, shardings=place, dtype="float32") for folder in (tmp_path, tmp_path / "grads")
    )
    weights = np.ones((2, 12), np.float32)
    weights[:, -1] = 0
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "weights": weights,
        "segments": np.ones_like(tokens),
        "positions": np.tile(np.arange(12, dtype=np.int32), (2, 1)),
    }
    loss = sft_loss(config, compute=Compute())

    @jax.jit
    def mean(params):
        total, others = loss(params, None, batch)
        return total.mean(), others

    (value, others), ours = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    assert ("aux_loss" in others) is asked
    np.testing.assert_allclose(paths(ours)[ROUTER], paths(grads)[ROUTER], rtol=1e-4, atol=1e-6)
    alone, _ = cross_entropy_alone(config, compute=Compute())(params, None, batch)
    np.testing.assert_allclose(alone.mean() + 0.7 * asked * _aux(others), value, rtol=1e-6)


def _aux(others) -> float:
    return float(others["aux_loss"].mean()) if "aux_loss" in others else 0.0
