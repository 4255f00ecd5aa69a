"""A planned generation: slots, places and bytes by hand, and the engine's own block of decoding, compiled."""

import pytest

from launch import planned_generation
from launch.chips import target_of
from models.sharding import make_mesh, replicas
from tests.launch.test_estimate import SMALL, eight, planned_of

GRPO = (
    "--training.trainer_type=TRL_GRPO",
    "--training.reward_functions=[soft_20tokens_completions]",
    "--training.grpo.num_generations=4",
    "--training.grpo.max_completion_length=100",
    "--training.grpo.max_prompt_length=24",
    "--training.mixed_precision_dtype=BF16",
)
CACHE = 2 * 4 * 16 * 8 * 128 * 32 * 2  # keys and values, layers, slots, heads, places, width of a head, bytes
MATRICES, NORMS = 4 * (4 * 256 * 256 + 3 * 256 * 512), 9 * 256
VOCABULARY = 1024 * 256


def test_slots_places_and_bytes_by_hand(tmp_path):
    planned = planned_of(tmp_path, SMALL, eight(fsdp=8), *GRPO)
    generation = planned_generation.generation_of(planned)
    assert generation is not None
    assert (generation.slots, generation.places) == (16, 128)  # 124 tokens, by 64
    assert planned_generation.cache_bytes(generation, planned.mesh) == CACHE / 8
    # Embedding and head are there in bfloat16 for a generation; the layers for a block of steps.
    assert planned_generation.copied_bytes(planned, generation) == 2 * 2 * VOCABULARY / 8
    passing = planned_generation.passing_bytes(planned, generation)
    assert passing["copies of parameters"] == 2 * (2 * VOCABULARY + MATRICES) / 8 + 2 * (NORMS - 256)
    assert planned_generation.generation_of(planned_of(tmp_path, SMALL, eight(fsdp=8))) is None


def test_a_token_takes_as_long_as_reading_weights_and_cache(tmp_path):
    planned, goal = planned_of(tmp_path, SMALL, eight(fsdp=8), *GRPO), target_of("8xh100")
    generation = planned_generation.generation_of(planned)
    assert generation is not None
    times = planned_generation.times_of(planned, goal, generation, sent=None)
    weights = 2 * (MATRICES + VOCABULARY)  # an embedding is looked up, and not read
    assert times["memory"] == pytest.approx((weights + 2 * NORMS + CACHE / 8) / 3.35e12, rel=0.01)
    assert times["links between chips"] == pytest.approx(7 / 8 * weights / 450e9)


def test_the_engines_block_of_decoding_is_compiled(tmp_path):
    planned = planned_of(tmp_path, SMALL, make_mesh({"fsdp": 4, "tensor": 2}), *GRPO)
    generation = planned_generation.generation_of(planned)
    assert generation is not None
    assert generation.slots % replicas(planned.mesh) == 0
    found = planned_generation.compiled_block(planned, generation)
    cache = 2 * 4 * generation.slots * 8 * 128 * 32 * 2
    parameters = (4 * MATRICES + 2 * 2 * VOCABULARY) / 8 + 4 * NORMS
    assert found.arguments == pytest.approx(parameters + cache / 8, rel=0.02)  # and where each slot stands
    assert found.outputs < 0.1 * cache  # the cache takes its own place
    needed = planned_generation.needed_bytes(planned, generation, found)
    assert needed > found.arguments + 2 * 4 * MATRICES / 8  # the optimizer stays
