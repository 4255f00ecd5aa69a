"""The engine: the same answers whatever the slots, blocks, parts and devices; log-probabilities are the model's own."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from models.config import Compute, DecoderConfig, Layer
from models.decoder import head, hidden_states, init_params
from models.families import decoder_config
from models.generate import GREEDY, Generated, Sampling, complete
from models.lora import Lora, init_adapter, merged
from models.quantized import quantised
from models.rope import Rope
from models.sharding import make_mesh, parameter_shardings
from models.weights import load_params
from tests.models.test_families import ABSENT, CASES, TIED, TINY, VARIANTS

ROPE = Rope(tuple(100.0 ** -(p / 4) for p in range(4)))
CONFIG = DecoderConfig(
    vocabulary=96,
    width=32,
    heads=4,
    kv_heads=2,
    head_width=8,
    mlp_width=48,
    activation="silu",
    norm_eps=1e-5,
    tied_head=True,
    initializer_range=0.3,
    each=(Layer(8, ROPE), Layer(None, ROPE)),  # a sliding window, and none
)
PARAMS = init_params(jax.random.key(0), CONFIG, dtype=jnp.float32)
PROMPTS = [[5, 6, 7], [5, 6, 7], list(range(10, 90)), [9], [5, 6, 7], [8, 8, 1, 2, 3, 4], [9]]
FREE = Sampling(1.0, 0, 1.0)


def ids(answers: list[Generated]) -> list[list[int]]:
    return [answer.ids for answer in answers]


def answer(prompts: list[list[int]], **options: Any) -> list[Generated]:
    options = {"max_new_tokens": 20, "stop_ids": {3}, "sampling": FREE, "seed": 1} | options
    return complete(options.pop("params", PARAMS), options.pop("config", CONFIG), prompts, **options)


@pytest.fixture(scope="module")
def plain() -> list[Generated]:
    return answer(PROMPTS)


@pytest.mark.parametrize("how", [{"slots": 2}, {"slots": 3, "block": 5}], ids=str)
def test_answers_do_not_depend_on_slots_and_blocks(plain: list[Generated], how: dict[str, int]) -> None:
    found = answer(PROMPTS, **how)
    assert ids(found) == ids(plain)
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_requests_with_one_prompt_draw_their_own_answers(plain: list[Generated]) -> None:
    assert len({tuple(plain[i].ids) for i in (0, 1, 4)}) == 3


def test_a_batch_in_parts_is_the_whole_batch_where_numbers_are_told(plain: list[Generated]) -> None:
    parts = answer(PROMPTS[:3], numbers=[0, 1, 2]) + answer(PROMPTS[3:], numbers=[3, 4, 5, 6])
    assert ids(parts) == ids(plain)


@pytest.mark.parametrize(
    "sizes", [pytest.param({"fsdp": 8}, marks=pytest.mark.slow), {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_answers_do_not_depend_on_the_mesh(plain: list[Generated], sizes: dict[str, int]) -> None:
    params = jax.device_put(PARAMS, parameter_shardings(PARAMS, make_mesh(sizes)))
    assert ids(answer(PROMPTS, params=params, slots=4)) == ids(plain)


@pytest.mark.slow
def test_the_cache_grows_with_the_answers() -> None:
    whole = answer(PROMPTS[:2], max_new_tokens=300, stop_ids=())
    assert [len(one.ids) for one in whole] == [300, 300]
    assert ids(answer(PROMPTS[:2], max_new_tokens=300, stop_ids=(), slots=1, block=100)) == ids(whole)


def test_lengths_may_differ_and_reasons_are_told(plain: list[Generated]) -> None:
    lengths = [1, 2, 3, 4, 5, 6, 7]
    found = answer(PROMPTS, max_new_tokens=lengths, slots=2)
    for one, free, most in zip(found, plain, lengths, strict=True):
        assert one.ids == free.ids[:most]
        assert one.finish == ("stop" if one.ids[-1] == 3 else "length")
        assert one.tokens == [token for token in one.ids if token != 3]
        assert len(one.ids) == len(one.logprobs) <= most


def test_an_answer_ends_before_a_stop_string() -> None:
    spell = lambda tokens: "".join(f"{token:02d}" for token in tokens)  # noqa: E731
    free = answer([[5, 6, 7]], stop_ids=())[0]
    text = spell(free.ids)
    stop = text[9:13]  # from within a token to within another
    found = answer([[5, 6, 7], [9]], stop_ids=(), stop_strings=[stop, "never there"], decode=spell)[0]
    first = text.index(stop)
    assert found.finish == "stop"
    assert found.ids == free.ids[: -(-(first + 4) // 2)]
    assert found.tokens == free.ids[: first // 2]
    assert len(found.logprobs) == len(found.ids)


def scored(params: Any, prompt: list[int], new: list[int], compute: Compute) -> np.ndarray:
    """Logits [new tokens, V] of a forward pass over prompt and answer."""
    tokens, there = np.zeros((2, 1, 128), np.int32)
    tokens[0, : len(prompt + new)] = prompt + new
    there[0, : len(prompt + new)] = 1
    logits = forward(params, tokens, there, compute)
    return np.asarray(logits[0, len(prompt) - 1 : len(prompt + new) - 1])


@functools.partial(jax.jit, static_argnums=3)
def forward(params: Any, tokens_BL: jax.Array, there_BL: jax.Array, compute: Compute) -> jax.Array:
    hidden = hidden_states(
        params,
        CONFIG,
        tokens_BL=tokens_BL,
        positions_BL=jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None],
        segments_BL=there_BL,
        compute=compute,
    )
    return head(params, CONFIG).logits(hidden)


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(GREEDY, marks=pytest.mark.slow),
        Sampling(0.7, 0, 1.0),
        Sampling(1.2, 30, 0.9, 0.02, repetition_penalty=1.3),
    ],
    ids=str,
)
def test_log_probabilities_are_those_of_a_forward_pass(sampling: Sampling) -> None:
    for prompt, one in zip(PROMPTS[2:6], answer(PROMPTS[2:6], sampling=sampling, slots=2), strict=True):
        logits = scored(PARAMS, prompt, one.ids, Compute())
        expected = jax.nn.log_softmax(logits / (sampling.temperature or 1.0))
        np.testing.assert_allclose(one.logprobs, expected[np.arange(len(one.ids)), np.array(one.ids)], atol=1e-5)
        assert (one.warped_logprobs is None) == (not sampling.warps)
        if one.warped_logprobs is not None:
            assert (one.warped_logprobs <= 0).all()
            assert np.abs(one.warped_logprobs - one.logprobs).max() > 0.01


@pytest.mark.parametrize(
    ("form", "dtype", "near"),
    [
        pytest.param("nf4", "float32", 1e-5, marks=pytest.mark.slow),
        (None, "float32", 1e-5),
        pytest.param(None, "bfloat16", 0.2, marks=pytest.mark.slow),
    ],
)
def test_a_model_with_an_adapter_answers_as_it_computes(form: str | None, dtype: str, near: float) -> None:
    lora = Lora(rank=4, alpha=8, init="random", modules=("layers/attention/q", "layers/mlp/down"))
    adapter = init_adapter(jax.random.key(3), PARAMS, lora)
    params = merged(adapter, quantised(PARAMS, form) if form else PARAMS)
    compute = Compute(lora=lora, dtype=jnp.dtype(dtype))
    one = answer(PROMPTS[:1], params=params, compute=compute, max_new_tokens=6)[0]
    expected = jax.nn.log_softmax(scored(params, PROMPTS[0], one.ids, compute))
    np.testing.assert_allclose(one.logprobs, expected[np.arange(len(one.ids)), np.array(one.ids)], atol=near)


def reference_and_ours(kind: str, name: str, folder: Path) -> tuple[Any, Any, Any]:
    sizes = {key: value for key, value in TINY.items() if key not in ABSENT.get(kind, ())}
    changes = VARIANTS.get(kind, {"as it comes": {}, "tied": TIED})[name]
    torch.manual_seed(0)
    hf_config = CONFIG_MAPPING[kind](**(sizes | changes))
    reference = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager").eval()
    with torch.no_grad():
        for path, parameter in reference.named_parameters():
            if parameter.ndim == 1 or "norm" in path or "bias" in path:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    reference.save_pretrained(folder)
    reference.generation_config.eos_token_id = None
    config = decoder_config(json.loads((folder / "config.json").read_text()))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return reference, load_params(folder, config, shardings=place, dtype="float32"), config


def check_greedy(kind: str, name: str, folder: Path, *, new: int) -> None:
    reference, params, config = reference_and_ours(kind, name, folder)
    prompts = [np.random.default_rng(n).integers(3, TINY["vocab_size"], n).tolist() for n in (11, 3, 20)]
    found = complete(params, config, prompts, max_new_tokens=new, stop_ids=(), slots=2)
    for prompt, one in zip(prompts, found, strict=True):
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            whole = reference.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False
            )
        assert one.ids == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["gemma3_text", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_greedy_answers_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    check_greedy(kind, next(iter(VARIANTS[kind])), tmp_path, new=24)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_greedy_answers_of_every_family_are_those_of_transformers(kind: str, name: str, tmp_path: Path) -> None:
    check_greedy(kind, name, tmp_path, new=64)
