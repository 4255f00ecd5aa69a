"""Rows from files, saved datasets, `datasets.load_dataset` and functions, by dataset entries of a configuration."""

import json

import datasets
import pytest

from input_pipeline.catalog import Entry, open_dataset
from input_pipeline.examples import Chat, RowError, Text
from input_pipeline.sources import open_rows

ROWS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]} for i in range(10)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same ten rows in every kind of file."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "rows.json").write_text(json.dumps(ROWS))
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(folder / "rows.parquet")
    dataset.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset.select(range(3))}).save_to_disk(folder / "splits")
    (folder / "empty").mkdir()
    (folder / "made.py").write_text("def rows(count):\n    return [{'text': f't{i}'} for i in range(count)]\n")
    return folder


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "saved", "splits"])
def test_the_same_rows_come_from_every_kind_of_file(folder, name):
    rows = open_rows(None, str(folder / name))
    assert [rows[i] for i in range(len(rows))] == ROWS
    assert rows.where(2) == f"row 3 of {folder / name}"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "saved"])
@pytest.mark.parametrize(
    ("split", "kept"), [("train[:3]", range(3)), ("train[80%:]", range(8, 10)), ("x[-2:]", range(8, 10))]
)
def test_a_split_with_a_slice_takes_a_part_of_a_file(folder, name, split, kept):
    rows = open_rows(None, str(folder / name), split=split)
    assert [rows[i] for i in range(len(rows))] == [ROWS[i] for i in kept]
    assert rows.where(0) == f"row {kept[0] + 1} of {folder / name}"


def test_a_saved_dataset_with_splits_gives_the_one_asked_for(folder):
    assert len(open_rows(None, str(folder / "splits"), split="test")) == 3
    with pytest.raises(ValueError, match=r"split 'dev' is not in .*splits; it has: train, test"):
        open_rows(None, str(folder / "splits"), split="dev")


def test_a_name_goes_to_load_dataset_with_its_subset_split_and_further_arguments(folder):
    entry = Entry(dataset_name="json", split="train[:4]", dataset_kwargs={"data_files": str(folder / "rows.jsonl")})
    dataset = open_dataset(entry)
    assert (len(dataset), dataset.meaning.format) == (4, "conversation")
    assert isinstance(dataset.example(3), Chat)
    assert dataset.rows.where(0) == "row 1 of json, split train[:4]"


def test_a_name_that_cannot_be_loaded_is_an_error_in_one_line():
    with pytest.raises(ValueError, match=r"^dataset 'no/such-set' \(split 'train'\) could not be loaded: ") as error:
        open_rows("no/such-set", None)
    assert "\n" not in str(error.value)


def test_a_function_in_a_file_or_a_module_gives_rows(folder):
    entry = Entry(dataset_name=f"{folder}/made.py:rows", dataset_kwargs={"count": 3}, split="train[1:]")
    dataset = open_dataset(entry)
    assert [dataset.example(i) for i in range(2)] == [Text(text="t1"), Text(text="t2")]
    assert dataset.rows.where(0) == f"row 2 of {folder}/made.py:rows"
    with pytest.raises(ValueError, match=r"made\.py has no function 'nothing'"):
        open_rows(f"{folder}/made.py:nothing", None)
    with pytest.raises(ValueError, match="dataset_name names the module 'no_such', which is not installed"):
        open_rows("no_such:rows", None)
    with pytest.raises(ValueError, match="must return a list of rows, not"):
        open_rows("time:time", None)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("missing.jsonl", "dataset_path '.*missing.jsonl' does not exist"),
        ("made.py", r"Unsupported file format: \.py of .*allowed: \.jsonl, \.json \(a list\), \.txt"),
        ("empty", "has no file of rows; allowed"),
    ],
)
def test_a_path_that_cannot_be_read_is_answered_with_what_can(folder, name, error):
    with pytest.raises(ValueError, match=error):
        open_rows(None, str(folder / name))


def test_text_sft_needs_a_path(folder):
    with pytest.raises(ValueError, match="dataset_name 'text_sft' reads rows from a file: set dataset_path"):
        open_dataset(Entry(dataset_name="text_sft"))


def test_a_bad_row_is_named_with_its_file_and_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "x"}]}\n\n{"messages": [{"role": "me", "content": "x"}]}\n[1]\n'
    )
    dataset = open_dataset(Entry(dataset_name="text_sft", dataset_path=str(path)))
    with pytest.raises(RowError) as error:
        dataset.example(1)
    allowed = "system, developer, user, assistant, tool"
    assert str(error.value) == f"row 3 of {path}: messages[0].role is 'me'; allowed: {allowed}"
    with pytest.raises(RowError, match=r"^row 4 of .*: a row must be an object, not list$"):
        dataset.example(2)


def test_the_format_is_found_from_the_first_row_unless_it_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('oops\n{"instruction": "a", "input": "", "output": "b", "messages": "x", "content": "c"}\n')
    entry = Entry(dataset_name="text_sft", dataset_path=str(path))
    with pytest.raises(RowError, match=r"data\.jsonl:1:1: not valid JSON"):
        open_dataset(entry)
    assert open_dataset(entry, skip_bad_rows=True).meaning.format == "conversation"
    named = Entry(dataset_name="text_sft", dataset_path=str(path), dataset_kwargs={"format": "alpaca"})
    assert open_dataset(named).meaning.format == "alpaca"
    text = Entry(dataset_name="text_sft", dataset_path=str(path), dataset_kwargs={"format": "text"})
    assert open_dataset(text, text_field="content").example(1) == Text(text="c")


def test_the_alpaca_names_read_with_the_system_prompt_unless_told_not_to(tmp_path):
    path = tmp_path / "alpaca.jsonl"
    path.write_text('{"instruction": "a", "input": "", "output": "b", "text": "all of it"}\n')
    entry = Entry(dataset_name="yahma/alpaca-cleaned", dataset_path=str(path))
    assert [m["role"] for m in open_dataset(entry).example(0).messages] == ["system", "user", "assistant"]
    without = Entry(
        dataset_name="tatsu-lab/alpaca", dataset_path=str(path), dataset_kwargs={"include_system_prompt": False}
    )
    assert [m["role"] for m in open_dataset(without).example(0).messages] == ["user", "assistant"]


def test_an_unknown_dataset_kwarg_of_a_file_is_answered_with_the_nearest(folder):
    entry = Entry(dataset_name="text_sft", dataset_path=str(folder / "rows.jsonl"), dataset_kwargs={"fromat": "alpaca"})
    with pytest.raises(ValueError, match=r"dataset_kwargs\.fromat is unknown; did you mean 'format'\?"):
        open_dataset(entry)
