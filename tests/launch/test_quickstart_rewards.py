"""The quickstart of rewards: what it asks and what pleases it, that nothing of it is held out, and its curve."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.load import load
from launch import quickstart
from launch.brief_answers import is_brief
from trainers.metrics import Metrics
from trainers.report import write_report
from trainers.reward_workers import RewardFunctions

ROOT = Path(__file__).resolve().parents[2]
BRIEF = "A boat is a vessel that carries people and goods across the water of rivers, lakes and seas."
CUT_OFF = BRIEF.removesuffix(" and seas.")
LONG = " ".join([BRIEF] * 3)
TWO_PARAGRAPHS = "A boat carries people.\n\nIt is made of wood."


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(ROOT)
    return load("configs/quickstart/grpo.yaml", []).config.training


def test_brief_answers_of_whole_sentences_are_worth_most(training: Any) -> None:
    texts = [BRIEF, CUT_OFF, LONG, TWO_PARAGRAPHS]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    with RewardFunctions(training.reward_functions, kwargs={}, timeout=20, workers=1) as judge:
        assert judge.names == ("soft_20tokens_completions", "whole_sentences")
        given = [["a prompt"] * len(texts), completions, [[0]] * len(texts)]
        scores = judge.score(*given, {"chosen": [None] * len(texts)})
    assert scores[:, 1].tolist() == [1, 0, 1, 0]
    brief, cut_off, long, two = scores.sum(axis=1)
    assert brief > 1.9
    assert brief > long > max(cut_off, two)
    assert [is_brief(text) for text in texts] == [True, False, False, False]


def test_what_is_asked_in_training_is_not_asked_afterwards(training: Any) -> None:
    task, options = quickstart.chosen(["grpo", "--training.max_steps", "5"])
    assert (task, options) == (quickstart.TASKS["grpo"], ["--training.max_steps", "5"])
    (dataset,) = load(task.config, options).config.data.train.datasets
    rows = [json.loads(line) for line in Path(dataset.dataset_path).read_text(encoding="utf-8").splitlines()]
    asked = {row["prompt"][0]["content"] for row in rows}
    held_out = {row.prompt[0]["content"] for row in quickstart.read_rows(task.held_out)}
    assert len(held_out) == quickstart.ROWS
    assert not asked & held_out


def test_the_report_shows_how_the_reward_grew(tmp_path: Path) -> None:
    with Metrics(tmp_path, tensorboard=False) as metrics:
        for step, reward in enumerate((0.5, 1.25, 1.75), start=1):
            metrics.log(step, {"loss": 0.0, "reward": reward})
    page = write_report(tmp_path, title="t", config_text="{}", environment={}).read_text(encoding="utf-8")
    assert "<b>0.50 → 1.75</b><span>reward</span>" in page
    assert page.index('alt="Loss over steps"') < page.index('alt="Reward"')
