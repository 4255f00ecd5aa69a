"""Memory stays flat while a stream is read: what a process holds does not grow with the corpus."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.tiny import sentence

READ = """
import sys
from transformers import AutoTokenizer
from input_pipeline.pipeline import train_feed
from input_pipeline.reading import Reading

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

corpus, rows, tokenizer = sys.argv[1], int(sys.argv[2]), AutoTokenizer.from_pretrained(sys.argv[3])
entry = {"dataset_name": "text", "dataset_path": corpus, "dataset_kwargs": {"sample_by": "line"}}
data = {"train": {"datasets": [entry], "stream": True, "pack": True}}
reading = Reading(max_length=2048, seed=1, packing="wrapped", trainer="OUMI")
feed = train_feed(data, tokenizer, reading=reading, rows_per_step=8, accumulation=1, epochs=None)
for _ in range(20):
    next(feed.batches)
start = most = resident()
while feed.counts.read < rows:
    next(feed.batches)
    most = max(most, resident())
print(start, most, feed.counts.read, feed.counts.tokens)
feed.batches.close()
"""


def grown(corpus: Path, rows: int, model: Path) -> int:
    """By how many bytes a process grows, after its first batches, while it reads a corpus of so many rows once."""
    command = [sys.executable, "-c", READ, str(corpus), str(rows), str(model)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr
    start, most, read, _ = map(int, done.stdout.split())
    assert read >= rows
    return most - start


def write(path: Path, size: int) -> int:
    """A corpus of at least so many bytes in four files; returns how many rows it has."""
    text = "".join(sentence(i, 50 + i % 600) + "\n" for i in range(3000)).encode()
    copies = -(-size // (4 * len(text)))
    path.mkdir()
    for number in range(4):
        with open(path / f"{number}.txt", "wb") as file:
            for _ in range(copies):
                file.write(text)
    return 4 * copies * 3000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("limit", "times"), [(24_000_000, 2), pytest.param(24_000_000, 50, marks=pytest.mark.slow)])
def test_memory_is_flat_while_streaming(tmp_path, tiny_chat_model, limit, times):
    rows = write(tmp_path / "corpus", times * limit)
    assert sum(file.stat().st_size for file in (tmp_path / "corpus").iterdir()) >= times * limit
    assert grown(tmp_path / "corpus", rows, tiny_chat_model) < limit
