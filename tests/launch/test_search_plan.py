"""A search ranks ways to run, keeps the batch, recommends what fits, and what it recommends loads."""

import dataclasses
import importlib.util

import pytest
from jax.sharding import AbstractMesh

from configs import derived
from configs.load import load
from launch import assemble
from launch.ahead import mesh_for
from launch.chips import GIB, target_of
from launch.estimate import Times
from launch.planned_batch import planned_on
from launch.search_plan import Candidate, candidates, judged, meshes, overrides, recommended, step_rows
from models.sharding import AXES
from tests.launch.test_end_to_end import einkorn
from tests.launch.test_estimate import MIXTURE, SMALL, planned_of

FOUR = target_of("4xh100")


def load_of(tmp_path, fields, *options):
    planned_of(tmp_path, fields, AbstractMesh((1,) * 5, AXES))
    return load(str(tmp_path / "plan.yaml"), options)


def way(name: str, gib: float, seconds: float, *, waits: float = 0.0, needed: float | None = None) -> Candidate:
    mesh = {"data": 1, "fsdp": 4}
    times = Times(1e12, {"matrix products": seconds, "memory": 0.1}, waits)
    return Candidate({"mesh.fsdp": 4}, mesh, "none", name, gib * GIB, times, needed)


def test_the_fastest_that_fits_is_recommended_and_waiting_counts():
    ways = [way("a", 70, 1.0), way("b", 20, 2.0, waits=0.5), way("c", 30, 2.2), way("d", 10, 9.0)]
    ranked = sorted(ways, key=lambda one: one.order)
    assert [one.rows for one in ranked] == ["a", "c", "b", "d"]
    chosen = recommended(ranked, FOUR)  # 70 of 77 GiB are more than formulas are trusted with
    assert chosen is not None
    assert chosen.rows == "c"
    assert recommended([way("a", 70, 1.0)], FOUR) is None


def test_what_needs_more_than_formulas_say_makes_others_need_more_too():
    needs = {"a": 100.0, "b": 70.0, "c": 72.0, "d": 30.0}  # GiB
    asked: list[str] = []

    def judge(one: Candidate) -> Candidate:
        asked.append(one.rows)
        return one._replace(needed=needs[one.rows] * GIB)

    ways = [way("a", 50, 1.0), way("b", 40, 1.1), way("c", 36, 1.2), way("d", 15, 2.0)]
    found = judged(ways, FOUR, most=4, judge=judge)
    assert asked == ["a", "c"]  # b would need 80 of 77 GiB; nothing behind c is faster
    chosen = recommended(found, FOUR)
    assert chosen is not None
    assert chosen.rows == "c"
    found = judged(ways, FOUR, most=1, judge=judge)
    assert recommended(found, FOUR) is None  # what was not compiled is not recommended beside what was


def test_meshes_divide_heads_experts_and_tokens(tmp_path):
    model = assemble.open_model(load_of(tmp_path, SMALL).config, only_config=True)
    found = [tuple(sizes.values()) for sizes in meshes(4, model, length=512)]
    assert (1, 4, 1, 1, 1) in found
    assert (1, 2, 1, 1, 2) in found  # 256 tokens each
    assert not [sizes for sizes in found if sizes[2] > 1 or sizes[4] > 2]  # no experts; 128 tokens are too few
    assert len(set(found)) == len(found)
    three = dataclasses.replace(model.config, heads=3, kv_heads=3)
    assert {sizes["tensor"] for sizes in meshes(4, model._replace(config=three), length=64)} == {1}


def test_experts_are_shared_where_there_are_some(tmp_path):
    model = assemble.open_model(load_of(tmp_path, MIXTURE).config, only_config=True)
    assert {sizes["expert"] for sizes in meshes(16, model, length=64)} == {1, 2, 4, 8}  # of eight


GRPO = (
    "--training.trainer_type=TRL_GRPO",
    "--training.reward_functions=[soft_20tokens_completions]",
    "--training.grpo.num_generations=4",
    "--training.grpo.max_completion_length=16",
    "--training.grpo.max_prompt_length=24",
    "--training.trainer_kwargs.steps_per_generation=4",
    "--training.gradient_accumulation_steps=2",
)


@pytest.mark.parametrize("options", [("--training.gradient_accumulation_steps=3",), GRPO], ids=["rows", "own answers"])
def test_every_way_keeps_the_batch_and_loads(options, tmp_path):
    config = load_of(tmp_path, SMALL, *options).config
    model = assemble.open_model(config, only_config=True)
    asked = step_rows(planned_on(mesh_for(config, FOUR, real=False), config, model))
    found = candidates(config, FOUR, model)
    assert len(found) > 20
    assert {one.remat for one in found} == {"none", "dots", "full"}
    for one in found[:: len(found) // 4]:
        changed = load_of(tmp_path, SMALL, *options, *(f"--{word}" for word in overrides(one))).config
        assert derived.mesh_axes(changed) == one.mesh
        assert derived.remat_policy(changed) == one.remat
        planned = planned_on(mesh_for(changed, FOUR, real=False), changed, model)
        assert step_rows(planned) == asked
        assert f"{planned.shapes.accumulation} × " in one.rows
    assert found == candidates(config, FOUR, model)


def test_a_search_recommends_what_fits_and_says_so_where_nothing_does(tmp_path):
    config = load_of(tmp_path, SMALL).config
    model = assemble.open_model(config, only_config=True)
    every = candidates(config, FOUR, model)
    least, first = min(one.estimated for one in every), every[0].estimated
    assert least < first
    for bytes_of_device in (least / 0.79, (least + first) / 2 / 0.8):
        small = FOUR._replace(chip=dataclasses.replace(FOUR.chip, hbm=bytes_of_device))
        chosen = recommended(candidates(config, small, model), small)
        assert chosen is not None
        assert chosen.estimated <= 0.8 * bytes_of_device
    small = FOUR._replace(chip=dataclasses.replace(FOUR.chip, hbm=least))
    assert recommended(candidates(config, small, model), small) is None


def test_the_command_prints_a_table_and_what_to_change(tmp_path):
    load_of(tmp_path, SMALL)
    done = einkorn("plan", "-c", str(tmp_path / "plan.yaml"), "--target", "4xh100", "--search")
    assert done.returncode == 0, done.stderr
    assert "an estimate by formulas" in done.stdout
    command = next(line for line in done.stdout.splitlines() if line.lstrip().startswith("--mesh"))
    assert load_of(tmp_path, SMALL, *command.split()).config.training.remat_policy in ("none", "dots", "full")
    assert "training: {remat_policy: " in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (684 MB) is not installed: extra `tpu`")
def test_the_best_ways_are_compiled_for_tpus(tmp_path):
    load_of(tmp_path, SMALL)
    words = ("--target", "v5e-4", "--search", "--search-compiles", "1")
    done = einkorn("plan", "-c", str(tmp_path / "plan.yaml"), *words)
    assert done.returncode == 0, done.stderr
    assert "compiling " in done.stdout
    assert "recommended" in done.stdout
