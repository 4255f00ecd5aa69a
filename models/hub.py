"""A model's name → a folder on this machine: a local folder as it is, any other name as a repository of the hub.

Only safetensors, JSON, templates and tokenizer files are ever fetched or read: a pickled `pytorch_model.bin` can run
code when it is opened.
"""

import json
import re
from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]


def resolve(model_name: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder that holds a model's config, tokenizer and (unless `weights` is false) safetensors files.

    The hub is asked only when no such folder exists, and never under HF_HUB_OFFLINE=1. Raises ValueError, in one
    line, for a name that is neither, a repository that cannot be had, and a folder without config.json or whole
    safetensors weights.
    """
    folder = Path(model_name).expanduser()
    if folder.is_file():
        gguf = f"convert it with: python -m models.gguf_import {model_name} FOLDER"
        cure = gguf if folder.suffix == ".gguf" else "give the folder around it"
        raise ValueError(f"model_name: {model_name} is a file; {cure}")
    if not folder.is_dir():
        folder = _download(model_name, revision=revision, weights=weights)
    if not (folder / "config.json").is_file():
        adapter = (
            " (a LoRA adapter? name the model it belongs to)" if (folder / "adapter_config.json").is_file() else ""
        )
        raise ValueError(f"model_name: {folder} has no config.json, so it is not a model folder{adapter}")
    if weights:
        weight_files(folder)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; ValueError names the missing shards, or says why there are none."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which its {INDEX} lists; download it again")
        return [folder / name for name in names]
    if pickled := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)):
        raise ValueError(
            f"{folder} has its weights only as {pickled[0]}, a pickle, which can run code when opened; "
            "only safetensors are read. Where you trust it, convert it once with transformers: "
            "from_pretrained(folder), then save_pretrained(new_folder)"
        )
    raise ValueError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")


def _download(model_name: str, *, revision: str | None, weights: bool) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_name) or model_name.startswith("."):
        raise ValueError(f"model_name: there is no folder {model_name}, nor is that a hub name (owner/name)")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*TOKENIZER_FILES, "*.safetensors"] if weights else TOKENIZER_FILES
    try:
        # subfolders hold other formats of the same weights (original/, onnx/), and so does Mistral's consolidated file
        ignored = ["*/*", "consolidated*"]
        return Path(snapshot_download(model_name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except GatedRepoError:
        why = "is gated: accept its terms on the hub and set HF_TOKEN"
    except RepositoryNotFoundError:
        why = "is no local folder, and the hub has no such repository (or it is private and HF_TOKEN is not set)"
    except RevisionNotFoundError:
        why = f"has no revision {revision!r} on the hub; change model.model_revision"
    except LocalEntryNotFoundError:
        offline = "HF_HUB_OFFLINE=1 forbids asking the hub" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        why = f"is no local folder, and not in the hub's cache, and {offline}; give a local folder"
    except HfHubHTTPError as error:
        why = f"could not be fetched from the hub: {str(error).splitlines()[0]}"
    raise ValueError(f"model_name: {model_name} {why}")
