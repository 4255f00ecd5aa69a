"""What a run says, to the letter."""

import io
import re

import pytest

from trainers.exits import Exit
from trainers.progress import Progress, duration, event_line, final_block, start_block

VALUES = {
    "loss": 1.23456,
    "learning_rate": 1.8e-5,
    "grad_norm": 0.5314,
    "entropy": 1.5,
    "tokens_per_second": 3120.4,
    "tokens_per_second_per_device": 390.05,
    "steps_per_second": 0.5,
    "mfu": 0.4123,
    "data_wait": 0.012,
    "eta_seconds": 753.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (42, "0:42"), (753, "12:33"), (3753, "1:02:33"), (176_553, "2 d 01:02:33")],
)
def test_durations_read_as_on_a_clock(seconds, text):
    assert duration(seconds) == text


def test_away_from_a_terminal_an_event_is_one_plain_line():
    out = io.StringIO()
    with Progress(1000, file=out) as progress:
        progress.advance(120)
        progress.show(120, VALUES)
        progress.show(120, {"eval_loss": 1.5, "eval_runtime": 2.25})
        progress.note("checkpoint-120 saved")
    assert out.getvalue().splitlines() == [
        "step  120/1000 (12 %)  loss 1.2346  lr 1.80e-05  grad_norm 0.531  3,120 tok/s (390 a device)  MFU 41.2 %  "
        "data wait 1 %  ETA 12:33  entropy 1.5",
        "step  120/1000 (12 %)  eval_loss 1.5000  eval_runtime 2.25",
        "checkpoint-120 saved",
    ]


def test_an_unknown_peak_is_said_to_be_unknown():
    line = event_line(1, 2, {"loss": 1.0, "tokens_per_second": 10.0, "tokens_per_second_per_device": 10.0})
    assert line == "step 1/2 (50 %)  loss 1.0000  10 tok/s  MFU n/a"


def test_how_well_text_is_predicted_follows_the_loss():
    values = {"eval_loss": 1.5, "eval_perplexity": 4.4817, "eval_bits_per_byte": 0.91234, "eval_entropy": 1.25}
    assert event_line(2, 2, values) == (
        "step 2/2 (100 %)  eval_loss 1.5000  perplexity 4.48  0.9123 bits a byte  eval_entropy 1.25"
    )


def test_a_loss_that_is_not_finite_is_shown_as_such():
    assert event_line(1, 2, {"loss": float("nan")}) == "step 1/2 (50 %)  loss nan"


def test_on_a_terminal_there_is_a_bar_with_the_last_event_and_notes_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    with Progress(1000, done_steps=100, file=out) as progress:
        progress.show(120, VALUES)
        progress.note("checkpoint-120 [saved]")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())  # without colours
    assert "120/1000 loss 1.2346 · lr 1.80e-05 · 3,120 tok/s · MFU 41.2 % · ETA 12:33" in text
    assert "checkpoint-120 [saved]\n" in text
    assert "grad_norm" not in text


def test_the_start_block_tells_what_is_about_to_happen():
    block = start_block(
        title="einkorn: supervised fine-tuning of SmolLM2-135M-Instruct",
        device_kind="TPU v5 lite",
        devices=8,
        processes=2,
        mesh={"data": 1, "fsdp": 4, "tensor": 2, "context": 1},
        parameters=134_515_008,
        trained=134_515_008,
        rows_per_step=32,
        row_length=2048,
        total_steps=1000,
        done_steps=400,
        epochs=3.0,
        resumed_from="checkpoint-400",
        output_dir="output/run",
        more=[("compute", "bfloat16")],
    )
    assert block.splitlines() == [
        "einkorn: supervised fine-tuning of SmolLM2-135M-Instruct",
        "  devices       8 × TPU v5 lite in 2 processes",
        "  mesh          fsdp 4 × tensor 2",
        "  parameters    134,515,008, all trained",
        "  a step        32 rows of up to 2,048 tokens = 65,536 tokens",
        "  steps         1,000 (3 epochs), 400 of them done",
        "  goes on from  checkpoint-400",
        "  output        output/run",
        "  compute       bfloat16",
    ]


def test_the_start_block_on_one_device_with_an_adapter():
    block = start_block(
        title="t",
        device_kind="cpu",
        devices=1,
        processes=1,
        mesh={"data": 1},
        parameters=1000,
        trained=36,
        rows_per_step=4,
        row_length=None,
        total_steps=10,
        done_steps=0,
        epochs=None,
        resumed_from=None,
        output_dir="o",
    )
    assert block.splitlines()[1:7] == [
        "  devices       1 × cpu",
        "  mesh          one device",
        "  parameters    1,000, 36 trained (3.6 %)",
        "  a step        4 rows",
        "  steps         10",
        "  goes on from  nothing, a fresh start",
    ]


def test_the_final_block_has_the_commands_that_load_the_model():
    block = final_block(
        output_dir="out put",
        steps=1000,
        seconds=753,
        values={"loss": 1.25},
        report="out put/report.html",
        exported=True,
    )
    assert block.splitlines() == [
        "Done: 1,000 steps in 12:33, loss 1.2500",
        "  model     out put",
        "  report    out put/report.html",
        "  load it   python -c 'from transformers import AutoModelForCausalLM; "
        'AutoModelForCausalLM.from_pretrained("out put")\'',
        "  serve it  vllm serve 'out put'",
    ]


def test_exit_codes_are_those_that_launchers_know():
    assert {exit.name: int(exit) for exit in Exit} == {
        "DONE": 0,
        "BAD_INPUT": 2,
        "DIVERGED": 3,
        "PREEMPTED": 42,
        "HUNG": 43,
        "INTERRUPTED": 130,
    }


def test_the_final_block_of_a_model_that_sees_loads_its_eyes_too():
    block = final_block(output_dir="runs/it", steps=1, seconds=1.0, values={}, report=None, exported=True, sees=True)
    assert "from transformers import AutoModelForImageTextToText; AutoModelForImageTextToText.from_pretrained" in block


def test_the_final_block_of_an_adapter_names_the_model_it_belongs_to():
    block = final_block(
        output_dir="runs/it", steps=1, seconds=1.0, values={}, report=None, exported=True, adapter_of="some/model"
    )
    assert "from peft import AutoPeftModel; AutoPeftModel.from_pretrained" in block
    assert "vllm serve some/model --enable-lora --lora-modules it=runs/it" in block
