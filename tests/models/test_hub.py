"""Names to folders: what is accepted, what is refused, in one line each, and what is fetched from a hub."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from models.hub import resolve

ROOT = Path(__file__).resolve().parents[2]


def refused(model_name: str | Path, **options: bool) -> str:
    with pytest.raises(ValueError, match=re.escape(str(model_name))) as caught:
        resolve(str(model_name), **options)
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(str(model_name), "MODEL")


def test_a_local_folder_is_taken_as_it_is(tiny_llama: Path) -> None:
    assert resolve(str(tiny_llama)) == tiny_llama


def test_a_home_folder_may_be_written_with_a_tilde(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_llama.parent))
    assert resolve("~/tiny-llama") == tiny_llama


def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub() -> None:
    for path in ("./nowhere/model", "/no/such/folder"):
        assert refused(path) == "model_name: there is no folder MODEL, nor is that a hub name (owner/name)"


def test_a_hub_name_under_offline_mode_says_that_the_hub_was_not_asked() -> None:
    assert refused("nobody/nothing-here") == (
        "model_name: MODEL is no local folder, and not in the hub's cache, and HF_HUB_OFFLINE=1 "
        "forbids asking the hub; give a local folder"
    )


def test_a_folder_without_config_is_refused_and_an_adapter_is_recognised(tmp_path: Path) -> None:
    assert refused(tmp_path) == "model_name: MODEL has no config.json, so it is not a model folder"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert refused(tmp_path).endswith("(a LoRA adapter? name the model it belongs to)")


def test_pickled_weights_are_refused_with_the_reason_and_the_cure(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert refused(tmp_path) == (
        "MODEL has its weights only as pytorch_model.bin, a pickle, which can run code when opened; "
        "only safetensors are read. Where you trust it, convert it once with transformers: from_pretrained(folder), "
        "then save_pretrained(new_folder)"
    )


def test_a_folder_without_weights_serves_where_none_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert refused(tmp_path) == "MODEL has no weights: neither model.safetensors nor model.safetensors.index.json"
    assert resolve(str(tmp_path), weights=False) == tmp_path


def test_missing_shards_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    where = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    shutil.copy(tiny_llama / "model.safetensors", tmp_path / "model-00001-of-00002.safetensors")
    assert refused(tmp_path) == (
        "MODEL lacks model-00002-of-00002.safetensors, which its model.safetensors.index.json lists; download it again"
    )


def test_a_gguf_file_is_answered_with_the_command_that_converts_it(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert refused(tmp_path / "model.gguf") == (
        "model_name: MODEL is a file; convert it with: python -m models.gguf_import MODEL FOLDER"
    )


FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same weights again",
    "onnx/config.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
    "modeling_custom.py": b"print('never run')",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download of one small repository, `owner/name`, takes."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        name = self.path.partition(f"/owner/name/resolve/{COMMIT}/")[2]
        if self.path.startswith("/api/models/owner/name/tree/"):
            tree = [
                {"type": "file", "path": file, "size": len(text), "oid": hashlib.sha1(text).hexdigest()}
                for file, text in FILES.items()
            ]
            content = json.dumps(tree).encode()
        elif self.path.startswith("/api/models/owner/name"):
            siblings = [{"rfilename": file} for file in FILES]
            content = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode()
        elif name in FILES:
            content = FILES[name]
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def resolve_with_hub(endpoint: str, cache: Path, call: str) -> str:
    """What `print(call)` prints in a process of its own: the hub's address is read when its library is imported."""
    code = f"from models.hub import resolve\ntry:\n    print({call})\nexcept ValueError as error:\n    print(error)"
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_only_config_safetensors_templates_and_tokenizer_are_fetched(hub: str, tmp_path: Path) -> None:
    folder = Path(resolve_with_hub(hub, tmp_path, "resolve('owner/name')"))
    assert sorted(file.name for file in folder.rglob("*")) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_weights_are_not_fetched_where_none_are_asked_for(hub: str, tmp_path: Path) -> None:
    folder = Path(resolve_with_hub(hub, tmp_path, "resolve('owner/name', weights=False)"))
    assert sorted(file.name for file in folder.rglob("*")) == ["chat_template.jinja", "config.json", "tokenizer.json"]


def test_an_unknown_repository_is_one_line(hub: str, tmp_path: Path) -> None:
    assert resolve_with_hub(hub, tmp_path, "resolve('owner/misspelt')") == (
        "model_name: owner/misspelt is no local folder, and the hub has no such repository (or it is private and "
        "HF_TOKEN is not set)"
    )


def test_a_hub_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    assert resolve_with_hub("http://127.0.0.1:9", tmp_path, "resolve('owner/name')") == (
        "model_name: owner/name is no local folder, and not in the hub's cache, and the hub cannot be reached; "
        "give a local folder"
    )
