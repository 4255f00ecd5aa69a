"""input_pipeline/formats/README.md says what the code does: every format, every key, every name of ours."""

import re

import pytest

from input_pipeline import formats
from input_pipeline.known import KNOWN
from input_pipeline.meaning import KEYS


@pytest.fixture(scope="module")
def readme(root):
    return (root / "input_pipeline/formats/README.md").read_text(encoding="utf-8")


def test_every_format_has_its_row_and_the_trainers_that_train_it(readme):
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| ([^|]*) \|$", readme, re.MULTILINE))
    assert set(rows) == set(formats.FORMATS)
    for name, trainer in rows.items():
        said = [trainer] if trainer in formats.TRAINED else ["TRL_SFT", "HF", "OUMI"]
        assert [each for each, trained in formats.TRAINED.items() if name in trained] == said


def test_every_key_and_every_name_is_told(readme):
    names = [name for name in KNOWN if "/" not in name]
    assert not [name for name in (*KEYS, *names) if f"`{name}`" not in readme]
