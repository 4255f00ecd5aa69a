"""The reader of JSON Lines and JSON files: what it accepts, and what its errors say."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.examples import RowError
from input_pipeline.files import File
from input_pipeline.jsonl import open_json, open_jsonl


def write(tmp_path, data: bytes, name: str = "rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_accepted(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \r\n{"a": "\xc3\xa9"}\r\n{"a": 3}')
    rows = open_jsonl(path)
    assert list(rows) == [{"a": 1}, {"a": "é"}, {"a": 3}]
    assert rows.numbers.tolist() == [1, 4, 5]


def test_a_broken_line_is_named_with_its_place_its_reason_and_its_beginning(tmp_path):
    path = write(tmp_path, b'{"a": 1}\n\n{"a": 2,, "long": "' + b"x" * 100 + b'"}\n')
    rows = open_jsonl(path)
    assert rows[0] == {"a": 1}
    with pytest.raises(RowError) as error:
        rows[1]
    shown = '{"a": 2,, "long": "' + "x" * 61
    reason = "Expecting property name enclosed in double quotes"
    assert str(error.value) == f"{path}:3:9: not valid JSON ({reason}): {shown}…"


def test_a_truncated_last_line_is_an_error_of_that_line_only(tmp_path):
    rows = open_jsonl(write(tmp_path, b'{"a": 1}\n{"a": '))
    assert len(rows) == 2
    assert rows[0] == {"a": 1}
    with pytest.raises(RowError, match=r"rows\.jsonl:2:7: not valid JSON \(Expecting value\)"):
        rows[1]


def test_a_byte_that_is_not_utf8_is_named_with_its_place_in_the_file(tmp_path):
    path = write(tmp_path, b'{"a": 1}\n{"a": "caf\xe9"}\n')
    with pytest.raises(RowError) as error:
        open_jsonl(path)[1]
    assert str(error.value) == f"{path}:2: byte 19 of the file (0xe9) is not UTF-8; save the file as UTF-8"


def test_json_types_are_kept_as_they_are(tmp_path):
    path = write(tmp_path, b'{"x": "5"}\n{"x": {"y": 5}}\n{"x": 5}\n{"z": null}\n')
    assert list(open_jsonl(path)) == [{"x": "5"}, {"x": {"y": 5}}, {"x": 5}, {"z": None}]


def test_a_json_file_must_hold_a_list(tmp_path):
    assert list(open_json(File(str(write(tmp_path, b'\xef\xbb\xbf[{"a": 1},\r\n {"a": 2}]', "a.json")), "json"))) == [
        {"a": 1},
        {"a": 2},
    ]
    with pytest.raises(ValueError, match=r"b\.json holds an object; a \.json file must hold a list of rows"):
        open_json(File(str(write(tmp_path, b'{"a": 1}', "b.json")), "json"))
    with pytest.raises(ValueError, match=r"c\.json:2:3: Expecting ',' delimiter"):
        open_json(File(str(write(tmp_path, b'[{"a": 1}\n  {"a": 2}]', "c.json")), "json"))


def test_nesting_too_deep_for_the_parser_is_a_bad_row_and_not_a_crash(tmp_path):
    path = write(tmp_path, b"[" * 200_000 + b"\n")
    with pytest.raises(RowError, match=r"rows\.jsonl:1"):
        open_jsonl(path)[0]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(), values, max_size=3), max_size=6),
    blank=st.sampled_from(["", "\n", "  \n\t\n", "\r\n"]),
    line_end=st.sampled_from(["\n", "\r\n"]),
    last_end=st.booleans(),
    bom=st.booleans(),
    escaped=st.booleans(),
)
def test_whatever_is_written_is_read_back(tmp_path_factory, rows, blank, line_end, last_end, bom, escaped):
    lines = [json.dumps(row, ensure_ascii=escaped) for row in rows]
    text = (line_end + blank).join(lines) + (line_end if last_end else "")
    data = (b"\xef\xbb\xbf" if bom else b"") + text.encode("utf-8", "surrogatepass")
    assert list(open_jsonl(write(tmp_path_factory.mktemp("f"), data))) == rows


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=200)
    | st.lists(
        st.sampled_from([b'{"a":1}', b"\n", b"[", b'"', b"\xff", b"\xef\xbb\xbf", b"\r", b"1e999", b"\x00"]),
        max_size=20,
    ).map(b"".join)
)
def test_no_file_makes_the_reader_fail_otherwise_than_with_the_rows_error(tmp_path_factory, data):
    path = write(tmp_path_factory.mktemp("f"), data)
    rows = open_jsonl(path)
    for i in range(len(rows)):
        with contextlib.suppress(RowError):
            rows[i]
