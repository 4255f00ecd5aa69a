"""Generation: transformers' greedy tokens, and draws that depend on seed, row and position alone."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.config import DecoderConfig, Layer
from models.decoder import init_params
from models.families import decoder_config
from models.generate import Sampling, generate, stop_ids_of, stream
from models.rope import Longer, Rope
from models.sampling import cut
from models.weights import load_params

QUESTIONS = (
    *("What is the capital of France?", "Name three primary colours.", "How many legs has a spider?", "What is 7 + 5?"),
    *("Write a sentence about rain.", "Who wrote Hamlet?", "What do bees make?", "Translate 'good morning' to French."),
    *("What is water made of?", "Give me a synonym of happy.", "Is the sun a star?", "What comes after Tuesday?"),
    *("Name a large ocean.", "What is the opposite of hot?", "Spell the word banana.", "What is a noun?"),
    *("How do plants make food?", "Name a planet with rings.", "What is ice?", "Tell me a short joke."),
)


def opened(folder: Path) -> tuple[Any, Any]:
    config = decoder_config(json.loads((folder / "config.json").read_text()))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return load_params(folder, config, shardings=one, dtype="float32"), config


@pytest.fixture(scope="module")
def tiny(tiny_chat_model) -> tuple[Any, Any]:
    return opened(tiny_chat_model)


@pytest.mark.slow
def test_the_real_smollm2_says_what_it_says_in_transformers(smollm2_folder):
    """Twenty questions, 64 greedy tokens each."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder, padding_side="left")
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in QUESTIONS
    ]
    reference = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    padded = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        full = reference.generate(**padded, max_new_tokens=64, do_sample=False)
    params, config = opened(smollm2_folder)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    stop_ids = stop_ids_of(json.loads((smollm2_folder / "generation_config.json").read_text()), tokenizer)
    answers = generate(params, config, prompts, max_new_tokens=64, stop_ids=stop_ids)
    for answer, row in zip(answers, full[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
        stops = [i for i, token in enumerate(row) if token in stop_ids]
        assert answer == row[: stops[0] if stops else None]


def test_a_short_prompt_beside_one_beyond_the_trained_context_rotates_as_a_short_one():
    short, long = (tuple(scale * 10.0 ** -(p / 4) for p in range(4)) for scale in (1.0, 0.2))
    config = DecoderConfig(
        vocabulary=64,
        width=32,
        heads=4,
        kv_heads=2,
        head_width=8,
        mlp_width=48,
        activation="silu",
        norm_eps=1e-5,
        tied_head=True,
        initializer_range=0.5,
        each=(Layer(None, Rope(short, beyond=Longer(16, long))),) * 2,
    )
    params = init_params(jax.random.key(0), config, dtype=jnp.float32)
    prompts = [[5, 6, 7, 8, 9, 10], list(range(10, 50))]
    together = generate(params, config, prompts, max_new_tokens=8, stop_ids=())
    apart = [generate(params, config, [prompt], max_new_tokens=8, stop_ids=())[0] for prompt in prompts]
    assert together == apart
    plain = dataclasses.replace(config, each=(Layer(None, Rope(short)),) * 2)
    assert apart[0] == generate(params, plain, [prompts[0]], max_new_tokens=8, stop_ids=())[0]


def test_a_row_does_not_depend_on_its_neighbours_or_their_lengths(tiny):
    params, config = tiny
    prompts = [[5, 6, 7], list(range(10, 90)), [9]]
    together = generate(params, config, prompts, max_new_tokens=12, stop_ids=())
    alone = [generate(params, config, [prompt], max_new_tokens=12, stop_ids=())[0] for prompt in prompts]
    assert together == alone
    assert [len(answer) for answer in together] == [12, 12, 12]


def test_streaming_draws_the_same_tokens_as_a_batch(tiny):
    params, config = tiny
    options = {"max_new_tokens": 20, "stop_ids": (), "sampling": Sampling(1.0, 0, 0.9), "seed": 3}
    assert list(stream(params, config, [5, 6, 7], **options)) == generate(params, config, [[5, 6, 7]], **options)[0]


def test_seeds_differ_and_repeat(tiny):
    params, config = tiny

    def draw(seed: int) -> list[int]:
        sampling = Sampling(1.0, 0, 1.0)
        return generate(params, config, [[5, 6]], max_new_tokens=16, stop_ids=(), sampling=sampling, seed=seed)[0]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_an_answer_ends_before_the_stop_token(tiny):
    params, config = tiny
    free = generate(params, config, [[5, 6, 7]], max_new_tokens=10, stop_ids=())[0]
    stopped = generate(params, config, [[5, 6, 7]], max_new_tokens=10, stop_ids={free[4]})[0]
    assert stopped == free[: free.index(free[4])]


def test_top_k_and_top_p_keep_what_they_say():
    logits = jnp.log(jnp.array([[0.5, 0.2, 0.2, 0.1]]))
    kept = lambda **how: np.isfinite(cut(logits, Sampling(1.0, **how)))[0].tolist()  # noqa: E731
    assert kept(top_k=1, top_p=1.0) == [True, False, False, False]
    assert kept(top_k=0, top_p=0.5) == [True, False, False, False]
    assert kept(top_k=0, top_p=0.6) == [True, True, True, False]  # the two at 0.2 are one as likely as the other
    assert kept(top_k=0, top_p=0.95) == [True, True, True, True]
    assert kept(top_k=0, top_p=0.0001) == [True, False, False, False]


def test_samples_follow_the_distribution(tiny):
    """4,000 rows with the same prompt: frequencies of the next token within five standard errors."""
    params, config = tiny
    rows = 4000
    sampling = Sampling(0.7, 0, 1.0)
    drawn = generate(params, config, [[5, 6, 7]] * rows, max_new_tokens=1, stop_ids=(), sampling=sampling, seed=0)
    from models.decoder import Compute, head, hidden_states

    tokens = jnp.array([[5, 6, 7]], jnp.int32)
    hidden = hidden_states(
        params,
        config,
        tokens_BL=tokens,
        positions_BL=jnp.array([[0, 1, 2]], jnp.int32),
        segments_BL=jnp.ones_like(tokens),
        compute=Compute(),
    )
    p = np.asarray(jax.nn.softmax(head(params, config).logits(hidden[0, -1]) / 0.7), np.float64)
    found = np.bincount([answer[0] for answer in drawn], minlength=len(p)) / rows
    assert (np.abs(found - p) < 5 * np.sqrt(p * (1 - p) / rows) + 1e-3).all()


def test_an_empty_prompt_is_refused(tiny):
    params, config = tiny
    with pytest.raises(ValueError, match="at least one token"):
        generate(params, config, [[]], max_new_tokens=1, stop_ids=())
