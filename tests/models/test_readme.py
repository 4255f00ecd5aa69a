"""models/README.md says what the code does: its worked example is a family's file, its table has every switch."""

import dataclasses
import re
from pathlib import Path

import pytest

from models.config import DecoderConfig


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "models/README.md").read_text(encoding="utf-8")


def test_the_worked_example_is_the_family_as_it_stands(root: Path, readme: str) -> None:
    [example] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert example == (root / "models/families/qwen3.py").read_text(encoding="utf-8")


def test_every_switch_of_the_decoder_is_explained(readme: str) -> None:
    table = readme[readme.index("## What may differ") :]
    switches = [one.name for one in dataclasses.fields(DecoderConfig) if one.default is not dataclasses.MISSING]
    assert len(switches) > 20
    assert not [name for name in ("each", *switches) if f"`{name}`" not in table]
