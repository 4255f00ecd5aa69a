"""What is logged can be read again, once for each step, however often the run was cut short."""

import json
import resource
import struct
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import TrainerState

from trainers.metrics import Metrics, Window, read_events


def lines(folder) -> list[dict]:
    """The events of the file as plain JSON, times taken out."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(event.pop("time") > 1.7e9 for event in events)
    return events


def board(folder) -> list[tuple]:
    """(step, tag, value) of TensorBoard's event files in the order written; ("purge", step) where one begins again."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            if event.HasField("session_log"):
                found.append(("purge", event.step))
            found += [(event.step, value.tag, round(value.simple_value, 4)) for value in event.summary.value]
    return found


def test_a_window_divides_once_and_counts_tokens_not_steps():
    window = Window()
    window.add({"loss": (jnp.float32(10.0), jnp.float32(2.0)), "grad_norm": (3.0, 1)})
    window.add({"loss": (jnp.float32(10.0), jnp.float32(8.0)), "grad_norm": (5.0, 1), "rare": (1.0, 0)})
    assert window.means() == {"loss": 2.0, "grad_norm": 4.0}
    assert window.means() == {}


def test_a_step_that_had_nothing_to_count_is_left_out_of_a_mean():
    window = Window()
    window.add({"rewards/rejected": (jnp.float32(jnp.nan), 1.0), "kl": (jnp.nan, 1.0)})
    window.add({"rewards/rejected": (jnp.float32(3.0), 1.0), "kl": (jnp.nan, 1.0)})
    assert window.means() == {"rewards/rejected": 3.0}


def test_an_event_goes_to_the_file_and_its_numbers_to_tensorboard(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.log(10, {"loss": jnp.float32(1.25), "learning_rate": np.float64(1e-4)}, epoch=0.5)
        metrics.log(10, {"eval_loss": 1.5}, epoch=0.5)
        metrics.log(20, {"train_runtime": 3.5, "note": "done", "counts": [1, 2]})
    assert lines(tmp_path) == [
        {"step": 10, "epoch": 0.5, "loss": 1.25, "learning_rate": 1e-4},
        {"step": 10, "epoch": 0.5, "eval_loss": 1.5},
        {"step": 20, "train_runtime": 3.5, "note": "done", "counts": [1, 2]},
    ]
    assert board(tmp_path / "tensorboard") == [
        (10, "train/epoch", 0.5),
        (10, "train/loss", 1.25),
        (10, "train/learning_rate", 0.0001),
        (10, "train/epoch", 0.5),
        (10, "eval/loss", 1.5),
        (20, "train/runtime", 3.5),
    ]


def test_what_is_not_finite_stays_visible_and_the_file_stays_json(tmp_path):
    with Metrics(tmp_path, tensorboard=False) as metrics:
        metrics.log(1, {"loss": jnp.float32(jnp.nan), "grad_norm": float("inf")})
    assert lines(tmp_path) == [{"step": 1, "loss": "nan", "grad_norm": "inf"}]
    (event,) = read_events(tmp_path / "metrics.jsonl")
    assert np.isnan(event["loss"])
    assert event["grad_norm"] == float("inf")
    assert not (tmp_path / "tensorboard").exists()


def test_a_resumed_run_goes_on_without_a_step_twice(tmp_path):
    with Metrics(tmp_path) as metrics:
        for step in (10, 20, 30):
            metrics.log(step, {"loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # what a kill leaves
    with Metrics(tmp_path, resume_step=20) as metrics:
        assert metrics.history == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}]
        metrics.log(30, {"loss": 3.5})
    assert lines(tmp_path) == [
        {"step": 10, "loss": 1.0},
        {"step": 20, "loss": 2.0},
        {"step": 30, "loss": 3.5},
    ]
    seen = board(tmp_path / "tensorboard")
    assert seen[-2:] == [("purge", 21), (30, "train/loss", 3.5)]


def test_a_resumed_run_without_an_earlier_log_begins_one(tmp_path):
    with Metrics(tmp_path, resume_step=20, tensorboard=False) as metrics:
        metrics.log(30, {"loss": 1.0})
    assert lines(tmp_path) == [{"step": 30, "loss": 1.0}]


def test_a_fresh_run_in_a_used_folder_keeps_the_old_log_under_another_name(tmp_path, caplog):
    for loss in (1.0, 2.0):
        with Metrics(tmp_path, tensorboard=False) as metrics:
            metrics.log(1, {"loss": loss})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0}]
    (older,) = tmp_path.glob("metrics-until-*.jsonl")
    assert read_events(older)[0]["loss"] == 1.0
    assert caplog.messages == [f"{tmp_path / 'metrics.jsonl'} of an earlier run is now {older.name}"]


def test_a_line_in_the_middle_that_is_no_event_is_told_with_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot JSON\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON object: not JSON"):
        Metrics(tmp_path, resume_step=2)


def test_transformers_reads_the_trainer_state(tmp_path):
    with Metrics(tmp_path, tensorboard=False) as metrics:
        metrics.log(10, {"loss": 2.0}, epoch=0.5)
        for step, loss in ((10, 1.5), (20, 1.25), (30, 1.0), (40, float("nan"))):
            metrics.log(step, {"eval_loss": loss}, epoch=step / 20)
        text = metrics.trainer_state(40, max_steps=40, epoch=2.0, num_train_epochs=2, saved_steps=[10, 20, 40])
        metrics.write_trainer_state(text)
    state = TrainerState.load_from_json(str(tmp_path / "trainer_state.json"))
    assert (state.global_step, state.max_steps, state.epoch, state.num_train_epochs) == (40, 40, 2.0, 2)
    assert state.log_history[0] == {"step": 10, "epoch": 0.5, "loss": 2.0}
    assert state.log_history[-1] == {"step": 40, "epoch": 2.0, "eval_loss": "nan"}
    assert (state.best_global_step, state.best_metric) == (20, 1.25)
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-20")


def test_a_full_disk_stops_nothing_and_loses_no_event_once_there_is_room(tmp_path, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Metrics(tmp_path, tensorboard=False) as metrics:
        metrics.log(1, {"loss": 1.0})
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # stands for the full disk
            metrics.log(2, {"loss": 2.0, "note": "x" * 60})
            metrics.log(3, {"loss": 3.0})
            assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        metrics.log(4, {"loss": 4.0})
    assert [event["step"] for event in lines(tmp_path)] == [1, 2, 3, 4]
    (message,) = caplog.messages
    assert "its lines are kept and tried again" in message


@pytest.fixture
def tracker(tmp_path, monkeypatch):
    """A stand-in for the wandb package: online it cannot be reached, and its first log fails when told so."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "wandb.py").write_text(
        textwrap.dedent("""
        class errors:
            class Error(Exception):
                pass
        calls, broken = [], []
        Settings = dict
        class Run:
            id = "run7"
            def log(self, values, step):
                if "log" in broken:
                    raise errors.Error("gone")
                calls.append((step, values))
            def finish(self):
                calls.append("finished")
        def init(mode, **arguments):
            calls.append((mode, arguments["project"], arguments.get("id")))
            if mode in broken:
                raise errors.Error("no network\\nlong story")
            return Run()
        """)
    )
    monkeypatch.syspath_prepend(tmp_path / "package")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    sys.modules.pop("wandb")


def test_a_tracker_that_cannot_be_reached_is_used_offline(tmp_path, tracker, caplog):
    tracker.broken.append(None)
    with Metrics(tmp_path, tensorboard=False, wandb={"project": "p", "id": "run7"}) as metrics:
        assert metrics.wandb_id == "run7"
        metrics.log(1, {"loss": 2.0, "eval_loss": 1.0, "note": "text"})
    assert tracker.calls == [
        (None, "p", "run7"),
        ("offline", "p", "run7"),
        (1, {"train/loss": 2.0, "eval/loss": 1.0}),
        "finished",
    ]
    assert caplog.messages == ["Weights & Biases failed (no network): trying offline"]


def test_a_tracker_that_fails_never_stops_training(tmp_path, tracker, caplog):
    tracker.broken.append("log")
    with Metrics(tmp_path, tensorboard=False, wandb={"project": "p"}) as metrics:
        metrics.log(1, {"loss": 2.0})
        metrics.log(2, {"loss": 1.0})
    assert [event["step"] for event in lines(tmp_path)] == [1, 2]
    assert caplog.messages == ["Weights & Biases failed (gone): going on without it, metrics stay in metrics.jsonl"]


def test_a_tracker_that_fails_offline_too_is_left_out(tmp_path, tracker, caplog):
    tracker.broken += [None, "offline"]
    with Metrics(tmp_path, tensorboard=False, wandb={}) as metrics:
        assert metrics.wandb_id is None
        metrics.log(1, {"loss": 2.0})
    assert tracker.calls == [(None, "einkorn", None), ("offline", "einkorn", None)]
    assert caplog.messages[-1] == (
        "Weights & Biases failed (no network): going on without it, metrics go to metrics.jsonl"
    )
