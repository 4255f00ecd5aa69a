"""A plan says what a run needs on devices that are not here: names, bytes and collectives by hand, and its own step."""

import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.load import load
from input_pipeline.collate import collate
from input_pipeline.prompts import PromptRow
from launch import assemble
from launch.ahead import compiled_step, too_large
from launch.chips import CHIPS, target_of
from launch.data import train_data
from launch.estimate import lasting_bytes
from launch.hlo import Collective, collectives
from launch.planned_batch import abstract_batch, planned_on, shapes_of
from models.generate import Generated
from models.sharding import make_mesh
from tests.launch.test_end_to_end import einkorn
from tests.parity.preference_runs import labelled, pairs
from tests.tiny import sentence
from trainers.rollout import Answered, lines_of

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "chips", "topology"),
    [
        ("v5e-16", 16, "v5e:4x4"),
        ("v5litepod-8", 8, "v5e:2x4"),
        ("v6e-256", 256, "v6e:16x16"),
        ("v5p-128", 64, "v5p:4x4x4"),  # cores, two a chip
        ("v5p-8", 4, "v5p:2x2x1"),
        ("v4-32", 16, "v4:2x2x4"),
        ("2xv5e-16", 32, "v5e:4x4"),
        ("8xh100", 8, None),
    ],
)
def test_a_target_is_so_many_chips_in_this_shape(name, chips, topology):
    goal = target_of(name)
    assert (goal.chips, goal.topology) == (chips, topology)
    if topology:
        assert goal.slices * math.prod(map(int, topology.split(":")[1].split("x"))) == chips


@pytest.mark.parametrize("name", ["v5e-12", "v5p-3", "h100-8", "16xv5e", "0xv5e-4", "v9-4", "", "v5e"])
def test_a_target_that_is_none_is_refused_with_those_that_are(name):
    with pytest.raises(ValueError, match="--target"):
        target_of(name)


PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %r = f32[] add(%a, %b)
}

%cond (p: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %g = bf16[1,8,4]{2,1,0:T(8,128)} all-gather(%w), channel_id=7, replica_groups=[2,4]<=[8], dimensions={1}
  %beside = (s32[]) while(%t), condition=%cond, body=%piece
}

%piece (p: bf16[8]) -> bf16[8] {
  %h = bf16[1,8,4]{2,1,0} all-gather(%w), channel_id=7, replica_groups=[2,4]<=[8], dimensions={1}
}

%all-reduce-scatter.1 (input: f32[16,4]) -> f32[16,1] {
  %s = f32[16,4]{1,0} all-reduce(%input), channel_id=8, replica_groups=[2,4]<=[8], to_apply=%add
}

%two_cond (p: (s32[], u32[])) -> pred[] {
  %m = u32[]{:T(128)} constant(8)
  %i.1 = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %m), direction=LT
}

%two_turns_in_one (p: (s32[], u32[])) -> (s32[], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %j = u32[]{:T(128)} get-tuple-element(%p), index=1
  %e = bf16[8]{0} all-to-all(%x), channel_id=9, replica_groups=mesh['x'=2,'y'=8] {'y'}, dimensions={0}
  %s1 = bf16[8]{0} all-gather(%x), channel_id=1, replica_groups={{0,1}}, metadata={op_name="f/shard_map/all_gather"}
  %s2 = bf16[8]{0} all-gather(%y), channel_id=1, replica_groups={{0,1}}, metadata={op_name="f/shard_map/all_gather"}
  %alone = bf16[8]{0} all-to-all(%x), channel_id=10, replica_groups=mesh['x'=1,'y'=8] {'x'}, dimensions={0}
  %j.2 = u32[]{:T(128)} add(%j, %two), metadata={op_name="add"}
  ROOT %t = (s32[], u32[]{:T(128)}) tuple(%x, /*index=1*/%j.2)
}

%known (p: (s32[])) -> (s32[]) {
  %c = (bf16[4]{0}, bf16[4]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w1 = (s32[]) while(%t), condition=%cond, body=%body
  %q = f32[16,1] fusion(%t), calls=%all-reduce-scatter.1
  %w2 = (s32[]) while(%t), condition=%other, body=%known, backend_config={"known_trip_count":{"n":"3"}}
  %w3 = (s32[], u32[]) while(%t), condition=%two_cond, body=%two_turns_in_one
  ROOT %a = (f32[], f32[2]{0}) all-reduce(%x, %y), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""


def test_collectives_are_counted_as_often_as_their_loops_run_and_pieces_once():
    assert collectives(PROGRAM) == {
        # Three of four parts are sent on; and those of two gathers of `jax.shard_map`, all of which have one channel.
        "all-gather": Collective(6 + 2 * 4, 6 * 64 + 8 * 16, 6 * 48 + 8 * 8),
        "all-reduce": Collective(1, 4 + 8, 18),  # twice three of four parts
        "reduce-scatter": Collective(1, 256, 192),
        "all-to-all": Collective(4, 4 * 16, 4 * 14),  # the one of one device is none
        "collective-permute": Collective(3, 3 * 8, 3 * 8),
    }


def test_the_text_that_this_xla_writes_is_understood():
    mesh = make_mesh({"fsdp": 8})
    rows, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)) for spec in (("fsdp",), ()))

    def summed_five_times(x):
        return jax.lax.scan(
            lambda total, _: (total + jax.lax.reduce(x * total[None, :], 0.0, jax.lax.add, (0,)), None),
            x[0],
            None,
            length=5,
        )[0]

    shape = jax.ShapeDtypeStruct((16, 100), jnp.float32, sharding=rows)
    found = collectives(jax.jit(summed_five_times, out_shardings=whole).lower(shape).compile().as_text())
    assert found["all-reduce"].runs >= 5
    assert found["all-reduce"].sent == 2 * 7 / 8 * found["all-reduce"].bytes


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory in memory space hbm. Used 20.47G of 15.75G hbm. Exceeded hbm capacity by 4.72G.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (15.9G) exceeds available HBM (15.7G)",
    ],
)
def test_the_compilers_answers_that_memory_does_not_suffice_are_known(message):
    assert too_large(f"RESOURCE_EXHAUSTED: {message} And more.") in message
    assert too_large("INTERNAL: something else of 3.0G") is None


def config_of(model, tmp_path, *options: str):
    file = tmp_path / "plan.yaml"
    file.write_text(
        f"model: {{model_name: {model}, model_max_length: 64}}\n"
        "data: {train: {datasets: [{dataset_name: text_sft, dataset_path: none.jsonl}]}}\n"
        "fsdp: {enable_fsdp: true}\n"
        f"training: {{trainer_type: TRL_SFT, output_dir: {tmp_path}/never, per_device_train_batch_size: 2}}\n"
    )
    return file, load(str(file), options)


def test_the_runs_own_step_is_compiled_without_weights_or_tokenizer(tiny_chat_model, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_bytes((tiny_chat_model / "config.json").read_bytes())
    config = config_of(tmp_path / "model", tmp_path)[1].config
    model = assemble.open_model(config, only_config=True)
    planned = planned_on(make_mesh({"fsdp": 8}), config, model)
    assert (planned.shapes.accumulation, planned.shapes.rows, planned.shapes.length) == (1, 16, 64)
    found, lasting = compiled_step(planned), lasting_bytes(planned)
    batch = 5 * 4 * 2 * 64
    assert found.arguments == pytest.approx(sum(lasting.values()) + batch, abs=64)  # and two scalars
    parameters = assemble.parameter_count(model).total
    assert sum(lasting.values()) >= 3 * 4 * parameters / 8  # what eight do not divide lies whole on each
    assert found.temporaries > 0
    assert found.said["all-gather"].runs >= 7 * model.config.layers  # each kernel of each layer, at least once


def rows_of(trainer: str) -> list[dict]:
    if trainer == "TRL_DPO":
        return [
            {"messages": row["prompt"], **{side: {"messages": row[side]} for side in ("chosen", "rejected")}}
            for row in pairs(32)
        ]
    return labelled()[:32] if trainer == "TRL_KTO" else [{"prompt": sentence(i, 3)} for i in range(32)]


@pytest.mark.parametrize(
    ("trainer", "dataset", "options"),
    [
        ("TRL_SFT", "text_sft", ("--data.train.pack=true",)),
        ("TRL_DPO", "preference_pairs_jsonl", ()),
        ("TRL_KTO", "text_sft", ()),
        ("TRL_KTO", "text_sft", ("--training.trainer_kwargs.loss_type=apo_zero_unpaired",)),
    ],
    ids=["packed", "pairs", "single answers", "single answers alone"],
)
def test_a_planned_batch_is_the_batch_of_a_run(trainer, dataset, options, tiny_chat_model, tmp_path, conversations):
    rows = conversations if trainer == "TRL_SFT" else rows_of(trainer)
    (tmp_path / "none.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = (f"--training.trainer_type={trainer}", f"--data.train.datasets.0.dataset_path={tmp_path}/none.jsonl")
    told += (f"--data.train.datasets.0.dataset_name={dataset}", *options)
    config = config_of(tiny_chat_model, tmp_path, *told)[1].config
    model, mesh = assemble.open_model(config), make_mesh({"fsdp": 8})
    planned = abstract_batch(config, model, mesh, shapes_of(config, model, mesh))
    feed = train_data(config, model, mesh, to_train=False)
    batch = next(feed.batches)
    feed.batches.close()
    assert {name: (array.dtype, array.ndim) for name, array in batch.items()} == {
        name: (array.dtype, array.ndim) for name, array in planned.items()
    }
    assert {array.shape[:2] for array in batch.values()} == {planned["tokens"].shape[:2]}
    assert batch["tokens"].shape[2] <= planned["tokens"].shape[2]


@pytest.mark.parametrize("together", [1, 2])
def test_a_planned_batch_of_own_answers_is_that_of_a_run(together, tiny_chat_model, tmp_path):
    told = ("--training.trainer_type=TRL_GRPO", "--training.reward_functions=[soft_20tokens_completions]")
    told += ("--training.grpo.num_generations=2", "--training.grpo.max_completion_length=16")
    told += ("--training.grpo.max_prompt_length=24", f"--training.trainer_kwargs.shared_prompt={together == 2}".lower())
    config = config_of(tiny_chat_model, tmp_path, *told, "--training.gradient_accumulation_steps=2")[1].config
    model, mesh = assemble.open_model(config, only_config=True), make_mesh({"fsdp": 8})
    shapes = shapes_of(config, model, mesh)
    assert (shapes.together, shapes.rows) == (together, 16 // together)
    assert shapes.length == 24 + together * 16 + (together - 1)
    answers = tuple(Generated([5, 6], "stop", [5, 6], np.zeros(2, np.float32), None) for _ in range(2))
    group = Answered(PromptRow((1, 2, 3), "p", {}, 0, "row 1"), answers, ("a", "b"), np.zeros((2, 1)), np.zeros(2))
    batch = collate(lines_of(group, mask_truncated=False, together=together), accumulation=1, rows=2, length=64)
    assert set(abstract_batch(config, model, mesh, shapes)) == set(batch)


def test_an_estimate_says_that_it_is_one(tiny_chat_model, tmp_path):
    file, _ = config_of(tiny_chat_model, tmp_path)
    done = einkorn("plan", "-c", str(file), "--target", "8xh100")
    assert done.returncode == 0, done.stderr
    assert "an estimate by formulas" in done.stdout
    assert "FLOPs of a step" in done.stdout
    assert not (tmp_path / "never").exists()
    done = einkorn("plan", "-c", str(file), "--target", "1xh100", "--training.per_device_train_batch_size=1000000")
    assert done.returncode == 1
    assert "does not fit" in done.stdout
    done = einkorn("plan", "-c", str(file), "--target", "h100")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_bytes_of_an_eight_billion_model_by_hand(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,'
        '"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,'
        '"rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": false}'
    )
    config = config_of(tmp_path, tmp_path, "--model.torch_dtype_str", "float32")[1].config
    mesh = jax.sharding.AbstractMesh((1, 16, 1, 1, 1), ("data", "fsdp", "expert", "tensor", "context"))
    model = assemble.open_model(config, only_config=True)
    lasting = lasting_bytes(planned_on(mesh, config, model))
    # 2 x 128256 x 4096 + 32 x (2 x 4096² + 2 x 4096 x 1024 + 3 x 4096 x 14336), and norms that lie whole everywhere
    matrices = 2 * 128256 * 4096 + 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    norms = 65 * 4096
    assert lasting["parameters"] == 4 * (matrices / 16 + norms)
    assert lasting["optimizer"] == 2 * lasting["parameters"]
    assert sum(lasting.values()) / GIB < CHIPS["v5e"].hbm / GIB


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (684 MB) is not installed: extra `tpu`")
def test_a_step_is_compiled_for_a_slice_of_tpus(tiny_chat_model, tmp_path):
    file, _ = config_of(tiny_chat_model, tmp_path)
    done = einkorn("plan", "-c", str(file), "--target", "v5e-4")
    assert done.returncode == 0, done.stderr
    assert "by the compiler" in done.stdout
    assert "all-gather" in done.stdout
