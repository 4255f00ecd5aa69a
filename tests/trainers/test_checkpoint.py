"""Checkpoints: bit-exact there and back, whole or refused, whatever is done to the process or to the files."""

import logging
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.trainers.small_state import (
    abstract,
    assert_same_bits,
    make_state,
    mesh_of,
    names,
    save_steps,
    shardings,
)
from trainers.checkpoint import Checkpoints, fingerprint, read_meta, restore_folder


def test_everything_comes_back_bit_for_bit(tmp_path):
    mesh = mesh_of(4, tensor=2)
    state = make_state(mesh)
    meta = {"config": "model:\n  model_name: x\n", "mesh": {"fsdp": 2, "tensor": 2}, "tokens_seen": 2**40}
    data_state = {"next_index": 640, "packer": b"\x00\xff", "rest": [1, None, 2.5, "ü"]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(40, state, data_state=data_state, meta=meta, files={"trainer_state.json": "{}"})
        assert checkpoints.wait() == 40
        step, restored, restored_data, restored_meta = checkpoints.restore(40, abstract(mesh, state))
    assert step == 40
    assert_same_bits(restored, state)
    assert restored["params"]["embed"]["embedding"].sharding == state["params"]["embed"]["embedding"].sharding
    assert restored_data == data_state
    about = restored_meta.pop("checkpoint")
    assert restored_meta == meta
    assert about["tree"] == {
        "opt_state/0/count": "int32[]",
        "opt_state/0/mu/embed": "float32[16, 8]",
        "params/embed/embedding": "float32[16, 8]",
        "params/norm/scale": "bfloat16[8]",
        "rng": "key<fry>[]",
        "step": "int32[]",
    }
    assert about["versions"]["jax"] == jax.__version__
    assert (about["step"], about["devices"], about["processes"]) == (40, 8, 1)
    assert names(tmp_path) == ["checkpoint-40"]
    assert set(names(tmp_path / "checkpoint-40")) >= {
        "state", "data_state.json", "meta.json", "trainer_state.json", "manifest.json",
    }  # fmt: skip


@pytest.mark.parametrize(("devices", "tensor"), [(1, 1), (8, 1), (2, 2), (8, 4)])
def test_a_checkpoint_of_one_mesh_restores_onto_another(tmp_path, devices, tensor):
    state = save_steps(tmp_path, 3)[3]
    mesh = mesh_of(devices, tensor=tensor)
    restored = restore_folder(tmp_path / "checkpoint-3", abstract(mesh, state)).state
    assert_same_bits(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == shardings(mesh, state)


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    state = {"w": jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh_of(4), PartitionSpec("fsdp")))}
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, data_state=None, meta={})
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        spoil(state)
        np.testing.assert_array_equal(checkpoints.restore(1, target).state["w"], np.ones((64, 64)))


def test_a_step_is_saved_once(tmp_path):
    state = {"w": jnp.ones(3)}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 2):
            checkpoints.save(step, state, data_state=None, meta={})
        checkpoints.wait()
        saved_at = (tmp_path / "checkpoint-2").stat().st_mtime_ns
        with pytest.raises(ValueError, match="checkpoint-1 exists already, and this run went on from step 2"):
            checkpoints.save(1, state, data_state=None, meta={})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(checkpoints.latest(), state)
        checkpoints.save(2, state, data_state=None, meta={})
        checkpoints.save(3, state, data_state=None, meta={})
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert (tmp_path / "checkpoint-2").stat().st_mtime_ns == saved_at


def change(**leaves: jax.Array | None):
    def changed(state: dict) -> dict:
        params = state["params"] | {name: leaf for name, leaf in leaves.items() if leaf is not None}
        return state | {"params": {name: leaf for name, leaf in params.items() if leaves.get(name, leaf) is not None}}

    return changed


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (change(norm={"scale": jnp.ones(8)}), "norm/scale is bfloat16[8] in the checkpoint, float32[8] here"),
        (change(norm={"scale": jnp.ones(9, jnp.bfloat16)}), "is bfloat16[8] in the checkpoint, bfloat16[9] here"),
        (change(norm=None), "params/norm/scale is bfloat16[8] in the checkpoint, absent here"),
        (change(head={"kernel": jnp.ones((8, 2))}), "head/kernel is absent in the checkpoint, float32[8, 2] here"),
    ],
    ids=["another dtype", "another shape", "a leaf too few", "a leaf too many"],
)  # fmt: skip
def test_a_tree_that_does_not_fit_is_refused_by_the_name_of_its_leaf(tmp_path, other, problem):
    state = save_steps(tmp_path, 3)[3]
    with pytest.raises(ValueError, match="does not fit this run") as error:
        restore_folder(tmp_path / "checkpoint-3", other(state))
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_a_leaf_that_is_no_jax_array_or_has_no_place_is_refused_by_name(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="step is a int: a train state holds jax arrays only"):
            checkpoints.save(1, {"step": 1}, data_state=None, meta={})
        with pytest.raises(ValueError, match=r"int64 cannot be saved in a checkpoint's JSON: np.int64\(3\)"):
            checkpoints.save(1, {"step": jnp.int32(1)}, data_state={"next": np.int64(3)}, meta={})
        checkpoints.save(1, {"step": jnp.int32(1)}, data_state=None, meta={})
        with pytest.raises(ValueError, match="step: the abstract leaf has no sharding"):
            checkpoints.restore(1, {"step": jax.ShapeDtypeStruct((), jnp.int32)})


def test_an_empty_folder_has_no_latest_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest() is None


def test_keep_n_keeps_the_newest_and_the_protected_one(tmp_path):
    state = {"w": jnp.ones(3)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        seen = []
        for step in (1, 2, 3, 10, 11):
            checkpoints.save(step, state, data_state=None, meta={})
            checkpoints.wait()
            seen.append(checkpoints.steps())
            if step == 2:
                checkpoints.protect(2)
        assert seen == [[1], [1, 2], [2, 3], [2, 10], [2, 11]]


def test_keep_none_keeps_all_and_keep_zero_is_refused(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
    with pytest.raises(ValueError, match="keep is 0; at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_leftovers_of_killed_saves_and_deletions_go_at_the_next_start(tmp_path):
    save_steps(tmp_path, 1)
    for name in ("checkpoint-2.orbax-checkpoint-tmp", "checkpoint-0.deleting", "checkpoint-9.corrupt"):
        (tmp_path / name / "state").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-9.corrupt"]


def test_going_on_from_an_older_step_moves_the_later_ones_aside_at_the_first_save(tmp_path, caplog):
    save_steps(tmp_path, 10, 20, 30)
    state = make_state(mesh_of(2), seed=10)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(10, state)
        assert checkpoints.steps() == [10, 20, 30]
        checkpoints.save(20, state, data_state=None, meta={})
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20", "checkpoint-20.superseded", "checkpoint-30.superseded"]
    assert "checkpoint-30 is not of this run, which began at step 10: now checkpoint-30.superseded" in caplog.messages


def test_a_second_run_in_the_same_folder_is_refused_with_the_holder_s_name(tmp_path):
    with Checkpoints(tmp_path), pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on .* since 2"):
        Checkpoints(tmp_path)
    assert names(tmp_path) == []
    Checkpoints(tmp_path).close()


def test_the_lock_of_a_killed_process_is_no_lock(tmp_path):
    code = (
        "import sys, pathlib, trainers.runlock as runlock\n"
        "lock = runlock.RunLock(pathlib.Path(sys.argv[1])); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"is in use by process {holder.pid} on "):
            Checkpoints(tmp_path)
        holder.kill()
        holder.wait()
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.latest() is None


def test_a_folder_on_a_bucket_is_refused_plainly():
    with pytest.raises(ValueError, match=r"not implemented yet: training.output_dir gs://b/run; mount the bucket"):
        Checkpoints("gs://b/run")


def test_a_disk_that_fills_up_during_a_save_is_survived_and_the_third_time_in_a_row_stops(tmp_path, caplog):
    small, big = {"w": jnp.ones(3)}, {"w": jax.random.normal(jax.random.key(0), (256, 1024))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, small, data_state=None, meta={})
        assert checkpoints.wait() == 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # stands for the full disk: writes beyond fail
            for step in (2, 3):
                checkpoints.save(step, big, data_state=None, meta={})
                assert checkpoints.wait() == 1
            checkpoints.save(4, big, data_state=None, meta={})
            with pytest.raises(
                RuntimeError,
                match=r"saving checkpoint-4 failed .*; finished checkpoints: checkpoint-1; 3 saves in a row",
            ):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        checkpoints.save(5, big, data_state=None, meta={})
        assert checkpoints.wait() == 5
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-5"]
    assert [message.split(" failed ")[0] for message in caplog.messages] == [
        "saving checkpoint-2",
        "saving checkpoint-3",
    ]
    assert all(
        message.endswith("; finished checkpoints: checkpoint-1; training goes on") for message in caplog.messages
    )
    assert not any("\n" in message for message in caplog.messages)


def test_a_disk_with_too_little_room_gives_up_older_checkpoints_but_never_the_newest(tmp_path, caplog, monkeypatch):
    full, nearly_full = (SimpleNamespace(free=free) for free in (0, 1_000))
    state = {"w": jnp.ones(1000)}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, data_state=None, meta={})
        checkpoints.wait()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: nearly_full)
        checkpoints.save(3, state, data_state=None, meta={})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
        checkpoints.save(4, {"w": jnp.ones(1_000_000)}, data_state=None, meta={})
        assert checkpoints.steps() == [2, 3]
    assert caplog.messages == [
        "saving checkpoint-4 failed (the disk has no room for its 4.0 MB); "
        "finished checkpoints: checkpoint-2, checkpoint-3; training goes on"
    ]


def test_saving_says_nothing_on_the_terminal(tmp_path, capfd):
    logging.getLogger("absl").setLevel(logging.INFO)
    save_steps(tmp_path, 1, 2, keep=1)
    assert capfd.readouterr() == ("", "")


ROOT = Path(__file__).resolve().parents[2]
SAVE_FOREVER = """
    import sys
    import jax.numpy as jnp
    from trainers.checkpoint import Checkpoints
    with Checkpoints(sys.argv[1], keep=2) as checkpoints:
        start = checkpoints.latest() or 0
        target = {"w": jnp.zeros((64, 64)), "step": jnp.int32(0)}
        if start:
            restored = checkpoints.restore(start, target)
            assert int(restored.state["step"]) == start and (restored.state["w"] == start).all(), restored
        print("from", start, flush=True)
        for step in range(start + 1, 10_000):
            state = {"w": jnp.full((64, 64), step, jnp.float32), "step": jnp.int32(step)}
            checkpoints.save(step, state, data_state=step, meta={})
            print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint_to_go_on_from(tmp_path):
    """Three kills -9 while saves never stop; the child itself checks what it restores."""
    dice = random.Random(2)
    last = 0
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(SAVE_FOREVER), str(tmp_path)],
            stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""},
        ) as child:  # fmt: skip
            start = int(child.stdout.readline().removeprefix("from "))
            assert start >= last - 2  # what was printed was on its way to the disk
            while int(line := child.stdout.readline()) < start + 4:
                pass
            time.sleep(dice.uniform(0, 0.05))
            os.kill(child.pid, signal.SIGKILL)
            last = int(line)
    with Checkpoints(tmp_path) as checkpoints:
        step = checkpoints.latest()
        assert step >= last - 2
        assert not list(tmp_path.glob("*.corrupt"))
        assert read_meta(checkpoints.find(step))["checkpoint"]["step"] == step


TWO_PROCESSES = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from trainers.checkpoint import Checkpoints
    folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, initialization_timeout=60)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("fsdp"))
    whole = np.arange(32, dtype=np.float32).reshape(8, 4)
    state = {"w": jax.make_array_from_callback((8, 4), sharding, lambda i: whole[i])}
    with Checkpoints(folder, keep=1) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(1, state, data_state={"next": 1}, meta={})
        checkpoints.save(2, jax.tree.map(lambda x: x + 1, state), data_state={"next": 2}, meta={})
        assert checkpoints.wait() == 2 and checkpoints.steps() == [2]
        step, restored, data_state, meta = checkpoints.restore(checkpoints.latest(), state)
        for shard in restored["w"].addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index] + 1)
        assert (step, data_state, meta["checkpoint"]["processes"]) == (2, {"next": 2}, 2)
        try:
            checkpoints.find(9)
        except ValueError as error:
            assert "no checkpoint at" in str(error), error
        else:
            raise AssertionError
    print("done", index)
"""


def test_one_file_alone_knows_orbax():
    rooms = [ROOT / room for room in ("configs", "models", "input_pipeline", "trainers", "launch")]
    imports = re.compile(r"^\s*(import|from) orbax\b", re.MULTILINE)
    files = [path for room in rooms for path in room.rglob("*.py")]
    assert [path.name for path in files if imports.search(path.read_text())] == ["checkpoint.py"]


def test_two_processes_save_together_and_one_restores_alone(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    code = textwrap.dedent(TWO_PROCESSES)
    commands = [[sys.executable, "-c", code, str(tmp_path), port, str(i)] for i in range(2)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env) for command in commands]
    try:
        said = [child.communicate(timeout=60)[0].splitlines()[-1:] for child in children]
        assert said == [["done 0"], ["done 1"]]
    finally:
        for child in children:
            child.kill()
    target = {"w": jnp.zeros((8, 4))}
    restored = restore_folder(tmp_path / "checkpoint-2", target).state["w"]
    np.testing.assert_array_equal(restored, np.arange(32).reshape(8, 4) + 1)
    assert fingerprint(target) == {"w": "float32[8, 4]"}
