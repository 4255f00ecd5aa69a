"""What a step needs and sends, by formulas: derived by hand, and held against compiled steps on eight devices."""

import json

import pytest
from jax.sharding import AbstractMesh

from configs.load import load
from launch import assemble
from launch.ahead import compiled_step
from launch.chips import target_of
from launch.estimate import lasting_bytes, passing_bytes, sent_bytes, times_of
from launch.planned_batch import planned_on
from models.sharding import AXES, make_mesh

SMALL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 1024,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
MIXTURE = SMALL | {
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def planned_of(tmp_path, fields, mesh, *options):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "plan.yaml").write_text(
        f"model: {{model_name: {tmp_path}, model_max_length: 128, torch_dtype_str: float32}}\n"
        "data: {train: {datasets: [{dataset_name: text_sft, dataset_path: none.jsonl}]}}\n"
        f"training: {{trainer_type: TRL_SFT, output_dir: {tmp_path}/never, per_device_train_batch_size: 2}}\n"
    )
    config = load(str(tmp_path / "plan.yaml"), options).config
    return planned_on(mesh, config, assemble.open_model(config, only_config=True))


def eight(**sizes):
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


LAYERS = 4 * (4 * 256 * 256 + 3 * 256 * 512)  # numbers of all matrices but the vocabulary's
NORMS = 9 * 256
STREAM = 256 * 4  # bytes of a token


def test_what_fsdp_sends_by_hand(tmp_path):
    sent = sent_bytes(planned_of(tmp_path, SMALL, eight(fsdp=8)))
    assert sent["parameters"] == 2 * 7 / 8 * 4 * LAYERS  # forward and backward
    # A part of each matrix's gradient stays here; what eight do not split is summed whole: twice seven eighths.
    assert sent["gradients"] == 7 / 8 * 4 * LAYERS + 2 * 7 / 8 * 4 * NORMS
    assert sent["tensor"] == sent["context"] == sent["expert"] == 0


def test_what_data_tensor_and_context_send_by_hand(tmp_path):
    sent = sent_bytes(planned_of(tmp_path, SMALL, eight(data=8), "--mesh.data=8"))
    assert sent["parameters"] == 0
    assert sent["gradients"] == 2 * 7 / 8 * 4 * (LAYERS + NORMS + 2 * 1024 * 256)
    sent = sent_bytes(planned_of(tmp_path, SMALL, eight(tensor=8), "--training.gradient_accumulation_steps=3"))
    assert sent["tensor"] == 3 * 4 * 4 * 2 * 7 / 8 * 2 * 128 * STREAM  # two sums a layer forward, two backward
    sent = sent_bytes(planned_of(tmp_path, SMALL, eight(context=4, tensor=2)))
    assert sent["context"] == 4 * 3 * 3 / 4 * 2 * 2 * 128 * STREAM / 2  # keys and values of half of the heads


def test_copies_that_meet_once_send_their_gradients_once(tmp_path):
    three = "--training.gradient_accumulation_steps=3"
    sent = sent_bytes(planned_of(tmp_path, SMALL, eight(data=8), three))
    assert sent["gradients"] == 0
    assert sent["copies' gradients"] == 2 * 7 / 8 * 4 * (LAYERS + NORMS + 2 * 1024 * 256)
    zero = "--deepspeed={enable_deepspeed: true, zero_stage: ZERO_2}"
    split = planned_of(tmp_path, SMALL, eight(data=8), three, zero)
    assert sent_bytes(split)["gradients"] == 3 * sent["copies' gradients"]
    assert lasting_bytes(split)["optimizer"] == 8 * (LAYERS + NORMS + 2 * 1024 * 256) / 8
    host = "--deepspeed={enable_deepspeed: true, zero_stage: ZERO_1, offload_optimizer: {device: cpu}}"
    assert lasting_bytes(planned_of(tmp_path, SMALL, eight(data=8), host))["optimizer"] == 0


def test_between_slices_go_the_gradients_of_each_devices_part(tmp_path):
    planned, goal = planned_of(tmp_path, SMALL, eight(data=2, fsdp=4)), target_of("2xv5e-4")
    times = times_of(planned, goal, sent=0.0).seconds
    part = (LAYERS + 2 * 1024 * 256) / 4 + NORMS
    assert times["links between slices"] == pytest.approx(4 * part / goal.chip.slice_rate)


@pytest.mark.parametrize(
    ("fields", "sizes", "remat"),
    [
        (SMALL, {"fsdp": 8}, "none"),
        pytest.param(SMALL, {"fsdp": 4, "tensor": 2}, "full", marks=pytest.mark.slow),
        pytest.param(SMALL, {"data": 2, "context": 4}, "none", marks=pytest.mark.slow),
        pytest.param(MIXTURE, {"fsdp": 2, "expert": 4}, "full", marks=pytest.mark.slow),
    ],
    ids=["fsdp", "tensor", "context", "expert"],
)
def test_what_is_sent_is_within_a_factor_of_two_of_what_a_compiled_step_sends(fields, sizes, remat, tmp_path):
    planned = planned_of(tmp_path, fields, make_mesh(sizes), f"--training.remat_policy={remat}")
    formula = sum(sent_bytes(planned).values())
    compiled = sum(one.sent for one in compiled_step(planned).said.values())
    # XLA for CPUs sums a whole gradient where a part of it stays, which is twice the bytes.
    assert 0.75 * formula < compiled < 2 * formula


def test_activations_by_hand(tmp_path):
    rows = "--training.per_device_train_batch_size=2"
    full = passing_bytes(planned_of(tmp_path, SMALL, eight(fsdp=8), rows, "--training.remat_policy=full"))
    every = 8 * STREAM + 3 * STREAM + 4 * 512 * 4  # of a token in a layer
    assert full["activations"] == 2 * 128 * (4 * STREAM + every)  # each layer's input, and all of one layer
    none = passing_bytes(planned_of(tmp_path, SMALL, eight(fsdp=8), rows, "--training.remat_policy=none"))
    assert none["activations"] == 2 * 128 * 4 * every
    assert full["gradients"] == 4 * ((LAYERS + 2 * 1024 * 256) / 8 + NORMS)


def test_the_least_time_of_a_step_by_hand(tmp_path):
    planned, goal = planned_of(tmp_path, SMALL, eight(tensor=8)), target_of("8xh100")
    times = times_of(planned, goal, sent=450e9)
    products = LAYERS + NORMS + 1024 * 256
    assert times.flops == 2 * 128 * (6 * products + 12 * 4 * 256 * 128)
    assert times.seconds["matrix products"] == pytest.approx(times.flops / (8 * 989.4e12))
    assert (times.bound, times.least) == ("links between chips", 1.0)
    assert times.waits == sent_bytes(planned)["tensor"] / 450e9
