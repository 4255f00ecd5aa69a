"""`einkorn tokenizer train`: what it writes is a tokenizer, the same each time, and says so."""

import gzip
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from input_pipeline.tokenizer import load_tokenizer
from launch.cli import app
from launch.tokenizer import Options, train
from tests.tiny import sentence

END = "<|endoftext|>"
PLAIN = Options(vocab_size=400, special=(END,))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": sentence(i, 30) + " 2026 — naïve 🌾"}) + "\n" for i in range(200)))
    return file


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_loads_in_transformers_and_gives_every_text_back(corpus, tmp_path, capsys):
    train([str(corpus)], tmp_path / "tokenizer", PLAIN)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) <= 400
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == END
    assert tokenizer.eos_token_id == 0
    for text in ("the mill of 1999\n\n  grain", "ÄÖ\u0000 漢字 🌾", END):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer("grain 2026")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["grain", "Ġ", "2", "0", "2", "6"]
    assert tokenizer.chat_template is None
    said = capsys.readouterr().out
    assert f"{tmp_path}/tokenizer: {len(tokenizer)} tokens" in said
    assert "bytes a token" in said
    assert load_tokenizer(str(tmp_path / "tokenizer")).pad_token == END  # as model.tokenizer_name takes it


def test_the_same_corpus_gives_the_same_bytes_from_files_of_any_kind(corpus, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    pa.parquet.write_table(pa.table({"text": texts}), tmp_path / "corpus.parquet")
    (tmp_path / "corpus.txt").write_text("\n\n".join(texts))
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    (tmp_path / "halves").mkdir()
    lines = corpus.read_text().splitlines(keepends=True)
    for name, half in (("a", lines[:100]), ("b", lines[100:])):
        (tmp_path / "halves" / f"{name}.jsonl").write_text("".join(half))
    others = [tmp_path / name for name in ("corpus.parquet", "corpus.txt", "corpus.jsonl.gz", "halves")]
    for number, file in enumerate((corpus, corpus, *others)):
        train([str(file)], tmp_path / str(number), PLAIN)
    first, *rest = (files_of(tmp_path / str(number)) for number in range(6))
    assert [found == first for found in rest] == [True] * 5


def test_for_chats_it_has_the_tokens_and_the_template_of_chatml(tmp_path):
    rows = [{"messages": [{"role": "user", "content": sentence(i, 9)}]} for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = CliRunner().invoke(
        app,
        [
            "tokenizer",
            "train",
            str(tmp_path / "chats.jsonl"),
            "--vocab-size=300",
            "--chat",
            f"--output={tmp_path}/tokenizer",
        ],
    )
    assert done.exit_code == 0, done.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "grain"}], tokenize=False)
    assert text.endswith("<|im_start|>user\ngrain<|im_end|>\n")


def test_a_limit_reads_no_more_than_it_says(corpus, tmp_path, capsys):
    train([str(corpus)], tmp_path / "tokenizer", PLAIN._replace(limit=1))
    assert "from 1 texts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 256}, "--vocab-size is 256; allowed: at least 257"),
        ({"special": ()}, "--special: name at least one token"),
    ],
)
def test_what_cannot_be_is_told_before_the_corpus_is_read(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(["nowhere.jsonl"], tmp_path, PLAIN._replace(**change))


def test_a_tokenizer_is_not_written_over(corpus, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a tokenizer already"):
        train([str(corpus)], tmp_path, PLAIN)


def test_a_row_without_text_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "grain"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match=r"row 2 of .*rows\.jsonl"):
        train([str(tmp_path / "rows.jsonl")], tmp_path / "tokenizer", PLAIN)
