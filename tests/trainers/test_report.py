"""The report is one page that stands alone, holds what it was given, and gives nothing away."""

import base64
import io
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from trainers.charts import smoothed
from trainers.environment import describe_environment
from trainers.metrics import Metrics
from trainers.report import Sample, redacted, write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Text of a page by section, its pictures, and every address it points to. Fails on tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.sections, self.addresses, self.pictures = [], {"": []}, [], {}
        self.section, self.tags = "", set()
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        self.addresses += [attributes[name] for name in ("src", "href", "data", "action") if name in attributes]
        if tag == "img":
            self.pictures[attributes["alt"]] = attributes["src"]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not data.strip() or "style" in self.stack:
            return
        if self.stack[-1] == "h2":
            self.section = data
            self.sections[data] = []
        else:
            self.sections[self.section].append(data)


@pytest.fixture
def run(tmp_path):
    with Metrics(tmp_path, tensorboard=False) as metrics:
        for step in range(1, 101):
            values = {"loss": 2.5 * math.exp(-step / 40), "learning_rate": 1e-4, "num_tokens": 1000 * step}
            metrics.log(step, values, epoch=step / 50)
        metrics.log(50, {"eval_loss": 1.25, "eval_perplexity": 3.49, "eval_bits_per_byte": 0.9})
        metrics.log(100, {"eval_loss": 0.75, "eval_perplexity": 2.117, "eval_bits_per_byte": 0.541})
        metrics.log(100, {"train_runtime": 753.0, "train_tokens_per_second": 132.8, "train_mfu": 0.412})
    return tmp_path


def full_report(folder) -> str:
    path = write_report(
        folder,
        title="SFT of <b>m</b>",
        subtitle="1 × cpu & more",
        config_text="model:\n  model_name: m\n  hub_token: hf_abcdefghijklmnopqrstuvwxyz\n",
        environment={"jax": "0.10.2", "devices": "1 × cpu"},
        samples=[
            Sample("Who? </pre><script>alert(1)</script>", "I don't know", '{"a": 1}\n', '{"a": 1}'),
            Sample("What?", "x", "y"),
        ],
        scores={"exact match": (0.02, 0.94)},
        counts={
            "a.jsonl": {"read": 4000, "used": 3996, "truncated": 3},
            "b.jsonl": {"read": 10, "used": 9, "dropped": 1},
        },
        commands=["vllm serve out"],
    )
    assert path == folder / "report.html"
    return path.read_text()


def test_the_page_says_to_the_letter_what_it_was_given(run):
    page = Page(full_report(run))
    assert page.sections == {
        "": [
            *("SFT of <b>m</b>", "SFT of <b>m</b>", "1 × cpu & more"),
            *("2% → 94%", "exact match", "2.438 → 0.205", "training loss", "1.250 → 0.750", "evaluation loss"),
            *("3.5 → 2.1", "perplexity", "0.900 → 0.541", "bits a byte"),
            *("100", "steps", "100,000", "tokens seen", "12:33", "time", "133", "tokens a second", "41.2%", "MFU"),
        ],
        "Curves": [],
        "Answers before and after": [
            "Who? </pre><script>alert(1)</script>",
            *("before ✗", "I don't know", "after ✓", '{"a": 1}\n', "expected", '{"a": 1}'),
            *("What?", "before", "x", "after", "y"),
        ],
        "Data": [
            *("dataset", "read", "used", "truncated", "dropped"),
            *("a.jsonl", "4,000", "3,996", "3", "0"),
            *("b.jsonl", "10", "9", "0", "1"),
        ],
        "Use it": ["vllm serve out"],
        "Settings": ["Configuration", "model:\n  model_name: m\n  hub_token: ***\n"],
        "Environment": ["jax", "0.10.2", "devices", "1 × cpu"],
    }


def test_the_page_needs_nothing_from_outside_and_runs_nothing(run):
    text = full_report(run)
    page = Page(text)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "form", "a"})
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert len(text) < 400_000


def test_the_curves_are_pictures_in_the_page_and_the_loss_is_a_file_too(run):
    page = Page(full_report(run))
    assert list(page.pictures) == ["Loss over steps", "Learning rate"]
    svg = base64.b64decode(page.pictures["Loss over steps"].split(",")[1]).decode()
    assert svg.startswith("<?xml")
    assert "<text" not in svg  # text is drawn as outlines: no font is needed
    with Image.open(io.BytesIO((run / "loss.png").read_bytes())) as picture:
        assert (picture.format, picture.width) == ("PNG", 1280)
        assert len(picture.convert("RGB").getcolors(100_000)) > 50


def test_the_same_run_gives_the_same_page(run):
    assert full_report(run) == full_report(run)


def test_a_run_that_logged_nothing_has_a_page_without_curves(tmp_path):
    path = write_report(tmp_path, title="t", config_text="{}", environment=describe_environment())
    sections = Page(path.read_text()).sections
    assert sections["Curves"] == ["No loss was logged."]
    assert sections["Environment"][0] == "devices"
    assert list(sections) == ["", "Curves", "Settings", "Environment"]
    assert not (tmp_path / "loss.png").exists()


def test_a_loss_that_was_not_finite_leaves_a_gap_and_a_word(tmp_path):
    with Metrics(tmp_path, tensorboard=False) as metrics:
        for step, loss in enumerate((2.0, float("nan"), float("inf"), 1.0, float("nan")), start=1):
            metrics.log(step, {"loss": loss})
    page = Page(write_report(tmp_path, title="t", config_text="{}", environment={}).read_text())
    assert page.sections[""][2:4] == ["2.000 → nan", "training loss"]
    assert "Loss over steps" in page.pictures


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("token: abc", "token: ***"),
        ("  wandb_api_key: 'abc'", "  wandb_api_key: ***"),
        ('  "HF_TOKEN": "abc",', '  "HF_TOKEN": ***'),
        ("- password = x y", "- password = ***"),
        ("hub_token: null", "hub_token: null"),
        ("tokenizer_pad_token: <pad>", "tokenizer_pad_token: <pad>"),
        ("max_tokens: 5", "max_tokens: 5"),
        ("see hf_abcdefghijklmnopqrstuv here", "see *** here"),
        ("https://me:secret@host/x", "https://***@host/x"),
        (f"key {'a1' * 20} end", "key *** end"),
        (f"model_revision: {'a1' * 20}", f"model_revision: {'a1' * 20}"),
    ],
)
def test_what_looks_like_a_credential_is_hidden(text, shown):
    assert redacted(text) == shown


def test_the_values_of_secret_environment_variables_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_API_KEY", "correct horse")
    assert redacted("it was 'correct horse', twice: correct horse") == "it was '***', twice: ***"


def test_smoothing_moves_nothing():
    line = [float(x) for x in range(100)]
    assert smoothed(line) == pytest.approx(line)
    assert smoothed([0.0, 0.0, 3.0, 0.0, 0.0]) == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_no_placeholder_is_left_in_the_page(run):
    assert not re.search(r"\$[a-z]", full_report(run))
