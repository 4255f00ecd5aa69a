"""The quickstart's data: the committed files are what the script makes, and the task is what it says."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from configs.load import load
from input_pipeline.packing import plan
from input_pipeline.tokenizer import load_tokenizer

QUICKSTART = Path(__file__).resolve().parents[2] / "configs/quickstart"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", QUICKSTART / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> list[list[dict[str, Any]]]:
    lines = (QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def answers(name: str) -> list[dict[str, Any]]:
    return [json.loads(messages[-1]["content"]) for messages in read(name)]


def test_the_script_writes_the_committed_files_byte_for_byte(script: ModuleType, tmp_path: Path) -> None:
    script.main(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes()


@pytest.mark.parametrize(("name", "rows"), [("train", 192), ("heldout", 64)])
def test_every_answer_is_one_object_with_the_five_keys_in_order(script: ModuleType, name: str, rows: int) -> None:
    assert len(read(name)) == rows
    for messages, answer in zip(read(name), answers(name), strict=True):
        assert [message["role"] for message in messages] == ["system", "user", "assistant"]
        assert tuple(answer) == script.KEYS
        assert answer["kind"] in ("meeting", "order", "delivery", "invoice")
        assert re.fullmatch(r"202[456]-\d\d-\d\d", answer["date"])


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_every_answer_can_be_read_off_its_message(name: str) -> None:
    for messages, answer in zip(read(name), answers(name), strict=True):
        text = messages[1]["content"]
        assert answer["person"] in text
        assert answer["company"] is None or answer["company"] in text
        assert answer["date"][:4] in text
        if answer["amount"] is not None:
            assert f"{answer['amount']:,.2f}".removesuffix(".00") in text


def test_held_out_people_and_companies_never_occur_in_training() -> None:
    surnames, companies = (
        [{pick(answer) for answer in answers(name)} - {None} for name in ("train", "heldout")]
        for pick in (lambda answer: answer["person"].split()[1], lambda answer: answer["company"])
    )
    for train, held_out in (surnames, companies):
        assert len(train) > len(held_out) > 5
        assert not train & held_out


def test_kinds_come_in_equal_shares_and_no_message_twice() -> None:
    for name, share in (("train", 48), ("heldout", 16)):
        kinds = [answer["kind"] for answer in answers(name)]
        assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
            ["meeting", "order", "delivery", "invoice"], share
        )
        texts = [messages[1]["content"] for messages in read(name)]
        assert len(set(texts)) == len(texts)


def test_packing_leaves_less_than_three_percent_of_the_rows_empty(smollm2_folder: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2_folder))
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in read("train")]
    lengths = np.array([len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]])
    row = load(str(QUICKSTART / "sft.yaml")).config.model.model_max_length
    packed = plan(lengths, row)
    assert (lengths.sum(), row, len(packed)) == (24116, 1032, 24)
    assert lengths.sum() / (row * len(packed)) >= 0.97
