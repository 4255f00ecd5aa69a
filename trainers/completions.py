"""Answers kept for people: all of every so many generations in a file, a few of them in the log."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trainers.metrics import set_aside
from trainers.rollout import Answered


@dataclass
class Completions:
    """Keeps answers in `file`, a JSON object a line, once in `every` updates or more; `show` is told of the first
    `rows` of them (None: all), of `one_of_each` prompt. `names` are the reward functions'.
    """

    file: Path
    names: Sequence[str]
    every: int
    rows: int | None
    one_of_each: bool
    show: Callable[[str], None]
    _due: int = 0

    def go_on(self, step: int) -> None:
        """Forget the answers that a run which goes on from `step` updates will give again; those of an earlier run
        are kept under another name when one starts afresh.
        """
        self._due = step
        if jax.process_index() != 0 or not self.file.exists():
            return
        if step == 0:
            set_aside(self.file)
        else:
            kept = [
                line for line in self.file.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] < step
            ]
            self.file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def __call__(self, step: int, groups: Sequence[Answered]) -> None:
        """Keep the answers of a generation that was made after `step` updates."""
        if jax.process_index() != 0 or step < self._due:
            return
        self._due = step + self.every
        events = [event for group in groups for event in self._events(step, group)]
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(event) + "\n" for event in events)
        if self.rows != 0:
            step_of = len(groups[0].answers) if self.one_of_each else 1
            self.show(table(events[::step_of][: self.rows]))

    def _events(self, step: int, group: Answered) -> list[dict[str, Any]]:
        return [
            {
                "step": step,
                "row": group.row.place,
                "prompt": group.row.prompt,
                "completion": text,
                "finish": answer.finish,
                "tokens": len(answer.ids),
                "rewards": {
                    name: None if np.isnan(value) else float(value)
                    for name, value in zip(self.names, rewards, strict=True)
                },
                "advantage": float(advantage),
            }
            for answer, text, rewards, advantage in zip(
                group.answers, group.texts, group.rewards, group.advantages, strict=True
            )
        ]


def table(events: Sequence[Mapping[str, Any]]) -> str:
    """Some answers with their rewards, a line each."""
    lines = []
    for event in events:
        prompt = event["prompt"] if isinstance(event["prompt"], str) else event["prompt"][-1]["content"]
        rewards = " ".join(
            f"{name} {value if value is None else round(value, 3)}" for name, value in event["rewards"].items()
        )
        said = f"{_short(prompt, 40)!r} → {_short(event['completion'], 80)!r}"
        lines.append(f"  {said}: {rewards}, advantage {event['advantage']:.2f}")
    return "\n".join(["answers:", *lines])


def _short(text: Any, limit: int) -> str:
    text = str(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"
