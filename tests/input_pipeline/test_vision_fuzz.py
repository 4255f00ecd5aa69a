"""Rows with pictures, bent out of shape in every way that files allow: each is understood, or is a RowError."""

import random

import pytest

from input_pipeline.content import pictures_of
from input_pipeline.examples import RowError
from input_pipeline.images import Opener
from input_pipeline.meaning import Meaning
from tests.input_pipeline.test_fuzz import mutated, refused, understood

BENT = {  # rows of every format, to be bent out of shape
    "conversation": {
        "images": ["a.png", {"bytes": b"GIF89a", "path": None}],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "content": "What?"}, {"type": "image"}]},
            {
                "role": "assistant",
                "content": [{"type": "image_binary", "binary": "R0lGODlh"}, {"type": "text", "content": "What?"}],
            },
        ],
    },
    "sharegpt": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>hi"}, {"from": "gpt", "value": "yo"}],
    },
    "prompt_completion": {"prompt": "<image>a", "completion": "b", "image": "a.png"},
    "alpaca": {"instruction": "a<image>", "output": "b", "images": [b"GIF89a"]},
    "preference": {"prompt": "a", "images": ["a.png"], "chosen": "x", "rejected": "y"},
    "kto": {"prompt": "a", "images": ["a.png"], "completion": "x", "label": True},
    "prompt": {"prompt": [{"role": "user", "content": "a"}], "images": [{"bytes": b"GIF89a"}]},
}


@pytest.mark.parametrize("name", BENT)
def test_a_row_with_pictures_bent_out_of_shape_is_understood_or_a_row_error(tmp_path, name):
    opener = Opener(root=str(tmp_path))
    for seed in range(200):
        row = mutated(BENT[name], random.Random(f"{name} {seed}"))
        example = understood(Meaning(format=name), row)
        try:
            opener.open(pictures_of(example) if example is not None else ())
        except RowError as error:
            refused(error)
