"""Every kind of file, read by index, in order, in parts, and from any place on: always the same rows."""

import gzip
import json
import pickle

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.examples import RowError
from input_pipeline.records import Shard
from input_pipeline.shards import open_shards
from input_pipeline.sources import open_rows

ROWS = [{"text": f"line {n} " + "é" * (n * 7 % 19)} for n in range(23)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
PROSE = "".join(f"{row['text']}\nand more\n\n" for row in ROWS).encode()
KINDS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.txt", "a.txt.gz", "a.parquet", "a.arrow"]
KINDS += ["b.arrow", "a.array_record", "saved"]


def packed(path, data):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(data)


def write(folder, name):
    """The rows as a file of the kind that its name says."""
    path = folder / name
    table = pa.Table.from_pylist(ROWS)
    if ".jsonl" in name:
        packed(path, LINES)
    elif ".json" in name:
        packed(path, json.dumps(ROWS).encode())
    elif ".txt" in name:
        packed(path, PROSE)
    elif name.endswith("parquet"):
        pa.parquet.write_table(table, path, row_group_size=5)
    elif name == "a.arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    elif name == "b.arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    elif name == "saved":
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
        datasets.enable_progress_bars()
    else:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in ROWS:
            writer.write(json.dumps(row).encode())
        writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("kinds")
    for name in KINDS:
        write(made, name)
    return made


def expected(name):
    return [{"text": f"{row['text']}\nand more"} for row in ROWS] if ".txt" in name else ROWS


def shard(path, **kwargs) -> Shard:
    (only,) = open_shards(None, str(path), kwargs=kwargs)
    return only


@pytest.mark.parametrize("name", KINDS)
def test_rows_by_index_and_in_order_are_the_rows_of_the_file(folder, name):
    rows = open_rows(None, str(folder / name))
    assert [rows[index] for index in range(len(rows))] == expected(name)
    records = list(shard(folder / name).read())
    assert [record.row for record in records] == expected(name)
    assert [shard(folder / name).where(record.number) for record in records] == [
        rows.where(i) for i in range(len(rows))
    ]


@pytest.mark.parametrize("name", KINDS)
def test_the_place_after_any_row_leads_to_the_rest(folder, name):
    for part in (shard(folder / name), shard(folder / name).part(1, 3)):
        records = list(part.read())
        for index, record in enumerate(records):
            place = json.loads(json.dumps(record.next))
            assert list(part.read(place)) == records[index + 1 :]


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 40))
def test_parts_are_the_whole_without_overlap(folder, name, count):
    whole = shard(folder / name)
    parts = [list(whole.part(index, count).read()) for index in range(count)]
    rows = [record.row for part in parts for record in part]
    named = [whole.part(i, count).where(record.number) for i, part in enumerate(parts) for record in part]
    assert sorted(map(str, rows)) == sorted(map(str, expected(name)))
    assert sorted(named) == sorted(whole.where(record.number) for record in whole.read())
    if not name.endswith((".jsonl.gz", ".jsonl.zst", ".txt.gz")):  # of which a part has every n-th row
        assert rows == expected(name)


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from([b"a", b"bcd\n", b"\n", b"\r\n", b" \n", "\u2028é\n".encode(), b"\n\n"]), max_size=20
    ),
    count=st.integers(1, 6),
    sample=st.sampled_from(["line", "paragraph", "document"]),
)
def test_parts_of_any_text_are_the_whole(tmp_path_factory, pieces, count, sample):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(b"".join(pieces))
    whole = shard(path, sample_by=sample)
    parts = [record.row for index in range(count) for record in whole.part(index, count).read()]
    assert parts == [record.row for record in whole.read()]


def test_what_is_a_row_of_a_text_can_be_chosen(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\r\n\n\n  \nthree\xe2\x80\xa8four")
    texts = {by: [r.row["text"] for r in shard(path, sample_by=by).read()] for by in ("line", "paragraph", "document")}
    assert texts["line"] == ["one", "two", "three\u2028four"]
    assert texts["paragraph"] == ["one\ntwo", "three\u2028four"]
    assert texts["document"] == ["one\ntwo\n\n\n  \nthree\u2028four"]
    assert [shard(path).where(record.number) for record in shard(path).read()] == [f"row {n} of {path}" for n in (1, 6)]
    with pytest.raises(ValueError, match=r"^dataset_kwargs\.sample_by is 'word'; allowed: line, paragraph, document$"):
        shard(path, sample_by="word")


def test_bad_lines_are_errors_that_name_the_line_of_the_file_in_every_part(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "a"}\n'] * 40
    lines[30], lines[33] = b"oops\n", b'{"text": "\xff"}\n'
    path.write_bytes(b"".join(lines))
    found = [r.row for i in range(4) for r in shard(path).part(i, 4).read() if isinstance(r.row, RowError)]
    assert [error.kind for error in found] == ["json", "encoding"]
    assert str(found[0]) == f"{path}:31:1: not valid JSON (Expecting value): oops"
    assert str(found[1]).startswith(f"{path}:34: byte {30 * 14 + 5 + 2 * 14 + 10} of the file (0xff) is not UTF-8")
    text = tmp_path / "a.txt"
    text.write_bytes(b"fine\n\nnot \xff fine\n\nfine")
    rows = [record.row for record in shard(text).read()]
    assert str(rows[1]) == f"{text}:3: byte 10 of the file (0xff) is not UTF-8"
    assert [row for row in rows if not isinstance(row, RowError)] == [{"text": "fine"}] * 2


def test_folders_and_patterns_are_their_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in [("b.jsonl", "b"), ("sub/a.jsonl.gz", "s"), ("a.jsonl", "a"), (".hidden.jsonl", "h")]:
        packed(tmp_path / name, json.dumps({"text": text}).encode())
    (tmp_path / "README.md").write_text("not rows")
    rows = open_rows(None, str(tmp_path))
    assert [row["text"] for row in rows] == ["a", "b", "s"]
    assert rows.where(1) == f"row 1 of {tmp_path / 'b.jsonl'}"
    assert [r.row["text"] for each in open_shards(None, str(tmp_path)) for r in each.read()] == ["a", "b", "s"]
    assert [row["text"] for row in open_rows(None, str(tmp_path / "**" / "*.gz"))] == ["s"]
    sliced = open_rows(None, str(tmp_path), split="train[1:]")
    assert ([row["text"] for row in sliced], sliced.where(1)) == (["b", "s"], f"row 1 of {tmp_path / 'sub/a.jsonl.gz'}")
    (tmp_path / "c.xyz").write_text("x")
    with pytest.raises(ValueError, match=r"^Unsupported file format: \.xyz of "):
        open_rows(None, str(tmp_path))


def test_files_of_another_store_are_read_through_fsspec():
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.jsonl", LINES)
    memory.pipe("/corpus/b.jsonl.gz", gzip.compress(LINES))
    found = open_shards(None, "memory://corpus")
    assert [record.row for each in found for record in each.read()] == ROWS * 2
    assert [record.row for i in range(3) for record in found[0].part(i, 3).read()] == ROWS
    assert list(open_rows(None, "memory://corpus/*.jsonl")) == ROWS
    with pytest.raises(ValueError, match=r"^dataset_path 'memory://nothing' does not exist$"):
        open_shards(None, "memory://nothing")
    with pytest.raises(ValueError, match=r"gs:// cannot be opened here .*pip install 'einkorn\[gcs\]'$"):
        open_shards(None, "gs://bucket/x.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.array_record"])
def test_a_damaged_file_is_named_in_one_line(folder, tmp_path, name):
    data = (folder / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: len(data) // 2] if "z" in name else b"x" * 40)
    with pytest.raises((ValueError, RowError), match=rf"^{path}.* (cannot be read|readable)") as error:
        list(shard(path).read())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "b.arrow", "a.jsonl.gz"])
def test_damage_inside_a_file_is_named_in_one_line(folder, tmp_path, name):
    data = (folder / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[:-100] if "arrow" in name else data[:30] + b"\xff" * 40 + data[70:])
    with pytest.raises(ValueError, match=rf"^{path} (cannot be read|is not a readable)") as error:
        list(shard(path).read())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_string_of_a_table_that_is_not_utf8_is_an_error_of_its_row_only(tmp_path, name):
    strings = pa.array([b"a", b"caf\xe9", b"b"]).cast(pa.binary())
    column = pa.StringArray.from_buffers(3, *strings.buffers()[1:])
    table = pa.table({"text": column})
    if name == "a.parquet":
        pa.parquet.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    first, bad, last = (record.row for record in shard(tmp_path / name).read())
    assert (first, last) == ({"text": "a"}, {"text": "b"})
    assert (str(bad), bad.kind) == (f"row 2 of {tmp_path / name}: a string is not UTF-8", "encoding")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet", "a.arrow", "a.array_record"])
def test_a_file_that_vanishes_meanwhile_is_named(folder, tmp_path, name):
    path = tmp_path / name
    path.write_bytes((folder / name).read_bytes())
    opened = shard(path)
    path.unlink()
    with pytest.raises(ValueError, match=rf"^{path} .*[Nn]o such file") as error:
        list(opened.read())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b"\n\r\n  \n", b"\xef\xbb\xbf\r\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.txt.zst"])
def test_a_file_without_rows_has_none(tmp_path, name, data):
    packed(tmp_path / name, data)
    assert list(shard(tmp_path / name).read()) == []
    assert len(open_rows(None, str(tmp_path / name))) == 0


@settings(max_examples=15, deadline=None)
@given(ends=st.tuples(st.integers(0, 46), st.integers(0, 46)).map(sorted).filter(lambda ends: ends[0] < ends[1]))
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.json"])
def test_a_slice_is_of_the_rows_of_all_files(tmp_path_factory, folder, name, ends):
    both = tmp_path_factory.mktemp("both")
    for copy in ("1" + name, "2" + name):
        (both / copy).write_bytes((folder / name).read_bytes())
    split = f"train[{ends[0]}:{ends[1]}]"
    found = open_shards(None, str(both), split=split)
    assert [r.row for each in found for r in each.read()] == (ROWS * 2)[slice(*ends)]
    assert [r.row for each in found for i in range(3) for r in each.part(i, 3).read()] == (ROWS * 2)[slice(*ends)]
    rows = open_rows(None, str(both), split=split)
    assert [each.where(r.number) for each in found for r in each.read()] == [rows.where(i) for i in range(len(rows))]


def test_a_slice_in_percent_of_a_file_that_knows_its_length(folder):
    (kept,) = open_shards(None, str(folder / "a.parquet"), split="train[90%:]")
    assert [record.row for record in kept.read()] == ROWS[21:]
    with pytest.raises(ValueError, match=r"^split 'train\[:0\]' of .*a\.parquet has 0 rows, of 23$"):
        open_shards(None, str(folder / "a.parquet"), split="train[:0]")


def test_a_slice_of_a_stream_whose_length_is_unknown_is_refused(folder):
    with pytest.raises(ValueError, match=r"split 'train\[:5\]' of a stream"):
        open_shards(None, str(folder / "a.jsonl"), split="train[:5]")


@pytest.mark.parametrize("name", KINDS)
def test_shards_go_to_other_processes(folder, name):
    part = shard(folder / name).part(1, 2)
    assert list(pickle.loads(pickle.dumps(part)).read()) == list(part.read())  # noqa: S301


def test_a_function_is_called_afresh_for_every_reading(tmp_path):
    (tmp_path / "rows.py").write_text("def numbers(count):\n    return ({'text': str(n)} for n in range(count))\n")
    (only,) = open_shards(f"{tmp_path}/rows.py:numbers", None, kwargs={"count": 7})
    rows = [record.row["text"] for record in only.read()]
    assert rows == list("0123456")
    assert [r.row["text"] for r in only.read({"row": 4})] == list("456")
    assert sorted(r.row["text"] for i in range(3) for r in only.part(i, 3).read()) == rows
    assert list(pickle.loads(pickle.dumps(only)).read()) == list(only.read())  # noqa: S301
    (tmp_path / "none.py").write_text("def nothing():\n    return None\n")
    (nothing,) = open_shards(f"{tmp_path}/none.py:nothing", None)
    with pytest.raises(ValueError, match=r"none\.py:nothing' must return rows, not None$"):
        list(nothing.read())


def test_a_dataset_of_datasets_streams_with_its_own_state(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_bytes(LINES)
    found = open_shards("json", None, kwargs={"data_files": str(tmp_path / "*.jsonl")})
    assert len(found) == 2
    assert [record.row for each in found for record in each.read()] == ROWS * 2
    records = list(found[1].read())
    (again,) = open_shards("json", None, kwargs={"data_files": str(tmp_path / "1.jsonl")})
    assert [record.row for record in again.read(json.loads(json.dumps(records[4].next)))] == ROWS[5:]


def test_readings_of_a_dataset_of_datasets_do_not_disturb_one_another(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (only,) = open_shards("json", None, kwargs={"data_files": str(tmp_path / "a.jsonl")})
    even, odd = only.part(0, 2).read(), only.part(1, 2).read()
    seen = [next(even), next(odd), next(odd), next(odd), next(even)]
    assert [record.row for record in seen] == [ROWS[i] for i in (0, 1, 3, 5, 2)]
    rest = [record.row for record in only.part(0, 2).read(json.loads(json.dumps(seen[-1].next)))]
    assert rest == ROWS[4::2]
    assert [record.row for record in only.read()] == ROWS
