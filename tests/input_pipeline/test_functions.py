"""A function of the user's own file behaves as in any module."""

import sys

import pytest

from input_pipeline.functions import named_function

DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import ClassVar

@dataclass
class Pair:
    least: ClassVar[int] = 1
    texts: list[str] = field(default_factory=list)

def count(rows):
    return len(Pair(rows).texts)
"""


def test_a_file_may_define_dataclasses_with_annotations_that_are_read_later(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "own_pairs", raising=False)
    (tmp_path / "own_pairs.py").write_text(DATACLASS)
    assert named_function(f"{tmp_path}/own_pairs.py:count", key="rows")(["a", "b"]) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}/none.py:f", "rows names the file .*none.py', which does not exist"),
        ("no_such_module:f", "rows names the module 'no_such_module', which is not installed; a file ends in .py"),
        ("json:none", "rows 'json:none': json has no function 'none'"),
    ],
)
def test_what_is_not_there_is_named_with_the_key(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        named_function(name.format(tmp_path), key="rows")
