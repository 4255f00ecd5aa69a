"""Entries of the token cache: what is written is read, what is damaged is made anew, and writers do not disturb."""

import json
import logging
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from input_pipeline.cache import Writing, key_of, load

DTYPES = {"ids": np.uint16, "trained": np.bool_, "sources": np.int64}
PIECES = [
    {"ids": np.arange(n), "trained": np.arange(n) % 2 == 0, "sources": np.arange(2 * n).reshape(n, 2)}
    for n in (3, 0, 500)
]


def write(folder, key="entry", pieces=PIECES, facts=None):
    with Writing(folder, key, DTYPES, columns={"sources": 2}) as writing:
        for piece in pieces:
            for name, array in piece.items():
                writing.append(name, array)
        return writing.finish(facts or {"note": "å", "rows": 3})


def assert_whole(entry, facts=None):
    assert entry.facts == (facts or {"note": "å", "rows": 3})
    for name, array in entry.arrays.items():
        np.testing.assert_array_equal(array, np.concatenate([piece[name] for piece in PIECES]))


def test_what_is_written_is_read_and_mapped_read_only(tmp_path):
    assert load(tmp_path / "cache", "entry") is None
    assert_whole(write(tmp_path / "cache"))
    found = load(tmp_path / "cache", "entry")
    assert_whole(found)
    assert isinstance(found.arrays["ids"], np.memmap)
    assert found.arrays["ids"].dtype == np.dtype("<u2")
    assert found.arrays["sources"].shape == (503, 2)
    with pytest.raises(ValueError, match="read-only"):
        found.arrays["ids"][0] = 1


def test_an_entry_without_rows_is_one_too(tmp_path):
    write(tmp_path, pieces=PIECES[1:2])
    assert {name: array.shape for name, array in load(tmp_path, "entry").arrays.items()} == {
        "ids": (0,),
        "trained": (0,),
        "sources": (0, 2),
    }


def test_what_is_not_finished_leaves_nothing_behind(tmp_path):
    with Writing(tmp_path, "entry", DTYPES) as writing:
        writing.append("ids", np.arange(3))
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_noticed_and_the_entry_made_anew(tmp_path, data, caplog):
    write(tmp_path)
    name = data.draw(st.sampled_from(["header.json", "ids.bin", "trained.bin", "sources.bin"]))
    file = tmp_path / "entry" / name
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[at:]
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = load(tmp_path, "entry")
    if found is not None:  # only white space of the header can be another
        assert name == "header.json"
        assert_whole(found)
        return
    assert "damaged" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert_whole(write(tmp_path))


@pytest.mark.parametrize("missing", ["header.json", "ids.bin"])
def test_a_missing_file_is_damage(tmp_path, missing):
    write(tmp_path)
    (tmp_path / "entry" / missing).unlink()
    assert load(tmp_path, "entry") is None
    assert list(tmp_path.iterdir()) == []


def test_an_entry_of_another_version_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("input_pipeline.cache.VERSION", 2)
    write(tmp_path)
    monkeypatch.undo()
    assert load(tmp_path, "entry") is None


def test_an_entry_too_large_to_be_read_through_must_have_the_right_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr("input_pipeline.cache._READ_THROUGH", 100)
    write(tmp_path)
    file = tmp_path / "entry" / "ids.bin"
    file.write_bytes(file.read_bytes()[:-2])
    assert load(tmp_path, "entry") is None


def test_the_second_to_finish_takes_what_the_first_has_written(tmp_path):
    with Writing(tmp_path, "entry", DTYPES) as slow:
        assert_whole(write(tmp_path))
        assert_whole(slow.finish({"note": "another"}))
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def _write_many(folder: Path, times: int) -> None:
    for _ in range(times):
        assert_whole(write(folder))
        found = load(folder, "entry")
        assert found is None or found.facts["rows"] == 3


def test_processes_that_write_the_same_entry_at_once_all_have_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(tmp_path, 15)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
    assert_whole(load(tmp_path, "entry"))


def test_what_a_killed_run_left_is_removed_after_a_day(tmp_path):
    for name, hours in ((".entry-old", 30), (".entry-new", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ids.bin").write_bytes(b"")
        for path in (tmp_path / name / "ids.bin", tmp_path / name):
            os.utime(path, (time.time() - hours * 3600,) * 2)
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".entry-new", "entry"]


def test_a_folder_that_cannot_be_written_is_an_error_that_names_the_key(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"token cache .*file.* cannot be written.*training\.token_cache_dir"):
        write(tmp_path / "file")


def test_a_hit_renews_the_time_of_its_folder(tmp_path):
    write(tmp_path)
    os.utime(tmp_path / "entry", (1, 1))
    load(tmp_path, "entry")
    assert time.time() - os.stat(tmp_path / "entry").st_mtime < 60


def test_keys_differ_wherever_their_parts_do():
    parts = [["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], [b"abc"], [["abc"]], [{"a": 1}], [{"a": 2}], [1], [None]]
    assert len({key_of(*part) for part in parts}) == len(parts)
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})


def test_the_header_is_plain_json(tmp_path):
    write(tmp_path)
    header = json.loads((tmp_path / "entry" / "header.json").read_text())["header"]
    assert header["version"] == 1
    assert header["facts"] == {"note": "å", "rows": 3}
    assert header["arrays"]["ids"]["dtype"] == "<u2"
    assert header["arrays"]["ids"]["bytes"] == 2 * 503
