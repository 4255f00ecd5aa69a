"""`report.html` and `loss.png`: a run on one page that needs nothing beside itself, no network, no script, no other
file.

Everything that comes from outside (settings, answers, names) is escaped and freed of what looks like a credential on
its way in.
"""

import html
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

from trainers.charts import as_data_uri, as_png, chart, loss_chart, series
from trainers.metrics import METRICS, read_events
from trainers.progress import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT, LOSS_PICTURE = "report.html", "loss.png"
HIDDEN = "***"

_SECRET_NAME = (
    r"(?:\w*(?:secret|password|passwd|api_?key|access_?key|credentials?)"
    r"|(?:(?:hf|hub|auth|use_auth|access|api|wandb)_)?token)"
)
_NAMED = re.compile(rf"(?im)^(\s*(?:- )?[\"']?{_SECRET_NAME}[\"']?\s*[:=]\s*)(?!null\b)\S.*$")
_LOOKS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})\b"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_HEX = re.compile(r"(?m)^(?!.*(?:revision|commit|sha)).*\b[0-9a-f]{40}\b.*$")  # keys of Weights & Biases; not a commit

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1f2937; --dim: #6b7280; --line: #e5e7eb; --page: #f6f5f1; --card: #fff;
  --good: #15803d; --bad: #b45309 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --dim: #9ca3af; --line: #374151; --page: #14161a; --card: #1e2126;
    --good: #4ade80; --bad: #fbbf24 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 1.2rem 1rem 3rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .4rem 0 0; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem }
.dim { color: var(--dim); margin: .2rem 0 }
.tiles, .charts, .answers { display: grid; gap: .6rem }
.tiles { grid-template-columns: repeat(auto-fill, minmax(9.6rem, 1fr)); margin: 1.2rem 0 }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); margin-top: .6rem }
.answers { grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); margin-top: .6rem }
.tile, .card, img { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .8rem }
.tile b { display: block; font-size: 1.15rem; line-height: 1.4; font-variant-numeric: tabular-nums }
.tile span { display: block; color: var(--dim); font-size: .8rem; line-height: 1.3 }
img { display: block; width: 100%; height: auto; background: #fff; padding: .5rem }
.sample { margin-bottom: .8rem }
.answers h3 { margin: 0 0 .2rem; font-size: .75rem; letter-spacing: .05em; text-transform: uppercase }
.answers h3 { color: var(--dim) }
.good h3 { color: var(--good) }
.bad h3 { color: var(--bad) }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th + th.right, td.right { text-align: right }
tr:last-child td { border-bottom: 0 }
summary { cursor: pointer; font-weight: 600 }
details pre { margin-top: .6rem }
</style>
</head>
<body>
<header><h1>$title</h1><p class="dim">$subtitle</p></header>
$body
</body>
</html>
""")


class Sample(NamedTuple):
    """One prompt and its answers, before and after training; `expected`, if there is a right one, judges both."""

    prompt: str
    before: str
    after: str
    expected: str | None = None


def redacted(text: str) -> str:
    """The text without credentials: by the name before them, by their look, and the values of this process's secret
    variables.
    """
    for name, value in os.environ.items():
        if len(value) >= 8 and re.fullmatch(_SECRET_NAME, name, re.IGNORECASE):
            text = text.replace(value, HIDDEN)
    text = _LOOKS.sub(HIDDEN, _NAMED.sub(rf"\g<1>{HIDDEN}", text))
    return _HEX.sub(lambda line: re.sub(r"\b[0-9a-f]{40}\b", HIDDEN, line[0]), text)


def write_report(
    output_dir: str | Path,
    *,
    title: str,
    subtitle: str = "",
    config_text: str,
    environment: Mapping[str, str],
    samples: Sequence[Sample] = (),
    scores: Mapping[str, tuple[float, float]] | None = None,
    counts: Mapping[str, Mapping[str, int]] | None = None,
    commands: Sequence[str] = (),
) -> Path:
    """Writes `report.html` and `loss.png` into `output_dir` from its `metrics.jsonl` and what is given; returns the
    page's path.

    scores: name → (before, after), such as exact match on held-out rows, 0 to 1. counts: dataset → what became of its
    rows (read, used, truncated, dropped, …). commands: lines that load the model.
    """
    folder = Path(output_dir)
    events = read_events(folder / METRICS) if (folder / METRICS).exists() else []
    loss = loss_chart(events)
    if loss is not None:
        (folder / LOSS_PICTURE).write_bytes(as_png(loss))
    sections = [
        _tiles(events, scores or {}),
        _charts(events, loss),
        _samples(samples),
        _counts(counts or {}),
        _commands(commands),
        _section("Settings", f'<details class="card"><summary>Configuration</summary>{_pre(config_text)}</details>'),
        _section("Environment", _card(_table(environment.items()))),
    ]
    page = _PAGE.substitute(title=_text(title), subtitle=_text(subtitle), body="\n".join(filter(None, sections)))
    path = folder / REPORT
    path.write_text(page, encoding="utf-8")
    return path


def _text(value: Any) -> str:
    """The only way in for what comes from outside."""
    return html.escape(redacted(str(value)))


def _pre(text: str) -> str:
    return f"<pre>{_text(text)}</pre>"


def _card(content: str) -> str:
    return f'<div class="card scroll">{content}</div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>"


def _table(rows: Iterable[Sequence[Any]], *, head: Sequence[str] = ()) -> str:
    """Numbers, and the heads of all columns but the first, stand on the right."""

    def cell(value: Any) -> str:
        return f'<td class="right">{value:,}</td>' if isinstance(value, (int, float)) else f"<td>{_text(value)}</td>"

    top = "".join(f'<th class="right">{_text(name)}</th>' for name in head)
    lines = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return f"<table>{f'<tr>{top}</tr>' if head else ''}{lines}</table>"


def _tiles(events: Sequence[dict[str, Any]], scores: Mapping[str, tuple[float, float]]) -> str:
    """The run in a few numbers; scores before → after, losses first → last."""
    tiles = [(f"{before:.0%} → {after:.0%}", name) for name, (before, after) in scores.items()]
    first_to_last = {
        "reward": ("reward", ".2f"),
        "loss": ("training loss", ".3f"),
        "eval_loss": ("evaluation loss", ".3f"),
        "eval_perplexity": ("perplexity", ",.1f"),
        "eval_bits_per_byte": ("bits a byte", ".3f"),
    }
    for name, (label, form) in first_to_last.items():
        _, values = series(events, name)
        if values:
            tiles.append((f"{values[0]:{form}} → {values[-1]:{form}}", label))
    last: dict[str, Any] = {name: value for event in events for name, value in event.items()}
    worded = {
        "step": ("steps", lambda value: f"{value:,}"),
        "num_tokens": ("tokens seen", lambda value: f"{value:,.0f}"),
        "train_runtime": ("time", duration),
        "train_tokens_per_second": ("tokens a second", lambda value: f"{value:,.0f}"),
        "train_mfu": ("MFU", lambda value: f"{value:.1%}"),
    }
    tiles += [(show(last[name]), label) for name, (label, show) in worded.items() if name in last]
    content = "".join(
        f'<div class="tile"><b>{_text(value)}</b><span>{_text(label)}</span></div>' for value, label in tiles
    )
    return f'<div class="tiles">{content}</div>' if tiles else ""


def _charts(events: Sequence[dict[str, Any]], loss: "Figure | None") -> str:
    if loss is None:
        return _section("Curves", '<p class="dim">No loss was logged.</p>')
    titles = {
        "reward": "Reward",
        "learning_rate": "Learning rate",
        "grad_norm": "Gradient norm",
        "tokens_per_second": "Tokens a second",
    }
    small = [(title, chart(events, name, title=title)) for name, title in titles.items()]
    images = "".join(_image(figure, title) for title, figure in small if figure is not None)
    return _section("Curves", f'{_image(loss, "Loss over steps")}<div class="charts">{images}</div>')


def _image(figure: "Figure", alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="{as_data_uri(figure)}">'


def _samples(samples: Sequence[Sample]) -> str:
    return _section("Answers before and after", "".join(map(_sample, samples))) if samples else ""


def _sample(sample: Sample) -> str:
    def answer(title: str, text: str, judged: bool) -> str:
        right = judged and sample.expected is not None and text.strip() == sample.expected.strip()
        verdict = "" if not judged or sample.expected is None else " good" if right else " bad"
        mark = {"": "", " good": " ✓", " bad": " ✗"}[verdict]
        return f'<div class="answer{verdict}"><h3>{title}{mark}</h3>{_pre(text)}</div>'

    answers = answer("before", sample.before, True) + answer("after", sample.after, True)
    if sample.expected is not None:
        answers += answer("expected", sample.expected, False)
    return f'<div class="card sample">{_pre(sample.prompt)}<div class="answers">{answers}</div></div>'


def _counts(counts: Mapping[str, Mapping[str, int]]) -> str:
    names = list(dict.fromkeys(name for row in counts.values() for name in row))
    rows = [[dataset, *(row.get(name, 0) for name in names)] for dataset, row in counts.items()]
    return _section("Data", _card(_table(rows, head=["dataset", *names]))) if counts else ""


def _commands(commands: Sequence[str]) -> str:
    return _section("Use it", _card(_pre("\n".join(commands)))) if commands else ""
