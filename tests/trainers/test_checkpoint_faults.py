"""Damage to a checkpoint: all of it is found, told in a line, and the one before is used."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainers.small_state import (
    abstract,
    assert_same_bits,
    make_state,
    mesh_of,
    names,
    save_steps,
)
from trainers.checkpoint import Checkpoints
from trainers.manifest import find_damage, write_manifest


def flip(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(bytes(data))


def truncate(path: Path, dice: random.Random) -> None:
    os.truncate(path, dice.randrange(path.stat().st_size))


def append(path: Path, dice: random.Random) -> None:
    path.write_bytes(path.read_bytes() + dice.randbytes(dice.randint(1, 9)))


def remove(path: Path, dice: random.Random) -> None:
    path.unlink()


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    save_steps(folder, 20, 30)
    return folder


FAULTS = [flip, truncate, append, remove]
EXPECTED_REASON = {flip: "content differs", truncate: "bytes, expected", append: "bytes, expected", remove: "missing"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_any_fault_in_any_file_of_the_newest_checkpoint_is_told_and_the_one_before_is_used(
    two_checkpoints, tmp_path, fault, caplog
):
    dice = random.Random(17)
    mesh = mesh_of(2)
    state = make_state(mesh, seed=20)
    listed = sorted(json.loads((two_checkpoints / "checkpoint-30/manifest.json").read_text())["files"])
    assert len(listed) > 8
    for n, name in enumerate([*listed, "manifest.json"]):
        folder = tmp_path / str(n)
        shutil.copytree(two_checkpoints, folder)
        fault(folder / "checkpoint-30" / name, dice)
        caplog.clear()
        with Checkpoints(folder) as checkpoints:
            assert checkpoints.latest() == 20
            restored = checkpoints.restore(20, abstract(mesh, state)) if n in (0, len(listed) - 1) else None
        if restored is not None:
            assert_same_bits(restored.state, state)
        assert names(folder) == ["checkpoint-20", "checkpoint-30.corrupt"]
        message = caplog.messages[0]
        assert message.startswith(f"checkpoint-30 is damaged ({name}: ")
        assert message.endswith("now checkpoint-30.corrupt; going back to checkpoint-20")
        if name != "manifest.json":
            assert EXPECTED_REASON[fault] in message


def test_two_hundred_random_faults_are_all_found(two_checkpoints, tmp_path):
    dice = random.Random(5)
    folder = tmp_path / "checkpoint-30"
    shutil.copytree(two_checkpoints / "checkpoint-30", folder)
    files = sorted(json.loads((folder / "manifest.json").read_text())["files"])
    found = 0
    for _ in range(200):
        path = folder / dice.choice(files)
        before = path.read_bytes()
        dice.choice(FAULTS)(path, dice)
        found += find_damage(folder) is not None
        path.write_bytes(before)
    assert found == 200
    assert find_damage(folder) is None


@settings(max_examples=30, deadline=None)
@given(content=st.binary(min_size=1, max_size=200), data=st.data())
def test_the_manifest_finds_every_single_flipped_bit(tmp_path_factory, content, data):
    folder = tmp_path_factory.mktemp("manifest")
    (folder / "a").write_bytes(content)
    write_manifest(folder)
    assert find_damage(folder) is None
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    (folder / "a").write_bytes((int.from_bytes(content) ^ 1 << bit).to_bytes(len(content)))
    assert find_damage(folder) == "a: content differs from what was saved"


def test_what_orbax_adds_after_the_manifest_is_not_needed(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint-30"
    (folder / "_CHECKPOINT_METADATA").write_text("no JSON")
    (folder / "commit_success.txt").unlink()
    state = make_state(mesh_of(1), seed=30)
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.latest() == 30
        assert_same_bits(checkpoints.restore(30, state).state, state)


def test_when_all_checkpoints_are_damaged_nothing_starts_afresh_by_itself(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "run")
    for step in (20, 30):
        (tmp_path / "run" / f"checkpoint-{step}" / "meta.json").unlink()
    with Checkpoints(tmp_path / "run") as checkpoints:
        with pytest.raises(
            ValueError, match=r"every checkpoint in .* is damaged: checkpoint-30 .*; checkpoint-20 .*meta.json: missing"
        ):
            checkpoints.latest()
        assert checkpoints.steps() == [20, 30]


def test_a_damaged_or_missing_checkpoint_asked_for_by_name_is_an_error(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoint-30"
    os.truncate(damaged / "meta.json", 10)
    state = make_state(mesh_of(1))
    with Checkpoints(tmp_path / "run") as checkpoints:
        with pytest.raises(
            ValueError,
            match=r"checkpoint-30 is damaged \(meta.json: 10 bytes, expected .*\); beside it there is checkpoint-20",
        ):
            checkpoints.restore(damaged, state)
        with pytest.raises(
            ValueError, match=r"no checkpoint at .*checkpoint-25; there is checkpoint-20, checkpoint-30"
        ):
            checkpoints.restore(25, state)
    assert damaged.is_dir()
