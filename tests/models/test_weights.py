"""Weights in and out: read is what transformers holds, written is what was read, and what is off is named."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax.sharding import SingleDeviceSharding
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models.decoder import abstract_params
from models.families import decoder_config
from models.sharding import make_mesh, parameter_shardings, paths
from models.weights import load_params, save_folder, stored_tensors

ROOT = Path(__file__).resolve().parents[2]


def one_device() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0])


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def load(folder: Path, *, dtype: Any = "float32", shardings: Any = None) -> Any:
    return load_params(folder, decoder_config(read_config(folder)), shardings=shardings or one_device(), dtype=dtype)


def save(folder: Path, params: Any, *, like: Path, **options: Any) -> None:
    hf_config = read_config(like)
    save_folder(folder, params, decoder_config(hf_config), hf_config=hf_config, **{"dtype": "bfloat16", **options})


def changed(folder: Path, to: Path, change: Any) -> Path:
    """A copy of a one-file model folder whose tensors went through `change(dict)`."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    tensors = stored_tensors(folder).items()
    return {name: np.fromfile(t.file, np.uint8, count=t.nbytes, offset=t.start).tobytes() for name, t in tensors}


def test_every_leaf_holds_transformers_numbers_layers_stacked_and_kernels_turned(tiny_llama: Path) -> None:
    state = {n: t.float().numpy() for n, t in AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict().items()}
    params = load(tiny_llama)
    assert {path: leaf.shape for path, leaf in paths(params).items()} == {
        "embed/embedding": (64, 32),
        "layers/input_norm/scale": (3, 32),
        "layers/attention/q/kernel": (3, 32, 32),
        "layers/attention/k/kernel": (3, 32, 16),
        "layers/attention/v/kernel": (3, 32, 16),
        "layers/attention/o/kernel": (3, 32, 32),
        "layers/post_norm/scale": (3, 32),
        "layers/mlp/gate/kernel": (3, 32, 48),
        "layers/mlp/up/kernel": (3, 32, 48),
        "layers/mlp/down/kernel": (3, 48, 32),
        "norm/scale": (32,),
        "head/kernel": (32, 64),
    }
    np.testing.assert_array_equal(params["embed"]["embedding"], state["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head"]["kernel"], state["lm_head.weight"].T)
    for i in range(3):
        layer = {
            name: state[f"model.layers.{i}.{name}.weight"]
            for name in ("mlp.down_proj", "self_attn.k_proj", "input_layernorm")
        }
        np.testing.assert_array_equal(params["layers"]["mlp"]["down"]["kernel"][i], layer["mlp.down_proj"].T)
        np.testing.assert_array_equal(params["layers"]["attention"]["k"]["kernel"][i], layer["self_attn.k_proj"].T)
        np.testing.assert_array_equal(params["layers"]["input_norm"]["scale"][i], layer["input_layernorm"])


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}]
)
def test_any_mesh_reads_the_same_numbers_as_one_device(tiny_llama: Path, sizes: dict[str, int]) -> None:
    abstract = abstract_params(decoder_config(read_config(tiny_llama)), dtype="float32")
    shardings = parameter_shardings(abstract, make_mesh(sizes))
    spread = load(tiny_llama, shardings=shardings)
    assert jax.tree.map(lambda x: x.sharding, spread) == shardings
    jax.tree.map(np.testing.assert_array_equal, spread, load(tiny_llama))


def test_files_of_a_model_without_its_head_lack_a_prefix_and_are_read_all_the_same(
    tiny_llama: Path, tmp_path: Path
) -> None:
    def without_head(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        del tensors["lm_head.weight"]

    bare = load(tie(changed(tiny_llama, tmp_path / "m", without_head)))
    whole = load(tiny_llama)
    del whole["head"]
    jax.tree.map(np.testing.assert_array_equal, bare, whole)


def test_a_model_in_many_files_reads_as_the_model_in_one(tiny_llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), load(tiny_llama))


def test_export_gives_back_each_tensor_byte_for_byte(tiny_llama: Path, tmp_path: Path) -> None:
    save(tmp_path / "out", load(tiny_llama), like=tiny_llama)
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tiny_llama)


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"data": 8}])
def test_export_from_a_mesh_in_small_files_gives_back_each_tensor_byte_for_byte(
    tiny_llama: Path, tmp_path: Path, sizes: dict[str, int]
) -> None:
    abstract = abstract_params(decoder_config(read_config(tiny_llama)), dtype="float32")
    params = load(tiny_llama, shardings=parameter_shardings(abstract, make_mesh(sizes)))
    save(tmp_path / "out", params, like=tiny_llama, max_shard_bytes=10_000)
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 3
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(map(len, tensor_bytes(tiny_llama).values()))
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tiny_llama)


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 10_000])
def test_transformers_loads_the_export_with_nothing_missing_and_the_same_logits(
    tiny_llama: Path, tmp_path: Path, max_shard_bytes: int
) -> None:
    save(tmp_path / "out", load(tiny_llama), like=tiny_llama, max_shard_bytes=max_shard_bytes)
    exported, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert exported.dtype == torch.bfloat16
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_llama)(tokens).logits
        assert torch.equal(exported(tokens).logits, expected)


def test_the_exported_config_is_the_original_but_for_its_dtype(tiny_llama: Path, tmp_path: Path) -> None:
    save(tmp_path / "out", load(tiny_llama), like=tiny_llama, dtype="float32", generation_config={"eos_token_id": 2})
    assert read_config(tmp_path / "out") == {**read_config(tiny_llama), "dtype": "float32"}
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"eos_token_id": 2}
    assert {t.dtype for t in stored_tensors(tmp_path / "out").values()} == {np.dtype("float32")}


def test_an_export_into_a_folder_in_use_replaces_the_model_and_leaves_the_rest(
    tiny_llama: Path, tmp_path: Path
) -> None:
    params = load(tiny_llama)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    save(tmp_path, params, like=tiny_llama, max_shard_bytes=10_000)
    save(tmp_path, params, like=tiny_llama)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "metrics.jsonl", "model.safetensors"]
    assert tensor_bytes(tmp_path) == tensor_bytes(tiny_llama)


def test_a_failing_export_leaves_no_folder_and_an_older_one_as_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("disk full")

    params, target = load(tiny_llama), tmp_path / "out"
    with pytest.raises(OSError, match="disk full"):
        save(target, params, like=tiny_llama, tokenizer=Broken())
    assert list(tmp_path.iterdir()) == []
    save(target, params, like=tiny_llama)
    with pytest.raises(OSError, match="disk full"):
        save(target, params, like=tiny_llama, dtype="float32", tokenizer=Broken())
    assert tensor_bytes(target) == tensor_bytes(tiny_llama)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def refused(folder: Path) -> str:
    """The one line with which loading a folder is refused."""
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        load(folder)
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(str(folder), "FOLDER")


def test_a_missing_tensor_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    folder = changed(tiny_llama, tmp_path / "m", lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    assert refused(folder) == "FOLDER: the weights lack model.layers.2.mlp.up_proj.weight"


def test_a_tensor_nobody_claims_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    folder = changed(
        tiny_llama, tmp_path / "m", lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
    )
    assert refused(folder) == (
        "FOLDER: no parameter claims model.layers.0.self_attn.q_proj.bias; without it the model would be another one"
    )


def test_more_layers_in_the_file_than_in_the_config_are_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    (folder / "config.json").write_text(json.dumps({**read_config(folder), "num_hidden_layers": 2}))
    assert "model.layers.2." in refused(folder)
    assert "and 6 more" in refused(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(tiny_llama: Path, tmp_path: Path) -> None:
    folder = changed(tiny_llama, tmp_path / "m", lambda t: t.update({"lm_head.weight": torch.ones(63, 32)}))
    assert refused(folder) == "FOLDER: lm_head.weight is [63, 32] where config.json asks for [64, 32]"


def test_buffers_that_old_files_carry_are_ignored(tiny_llama: Path, tmp_path: Path) -> None:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    load(changed(tiny_llama, tmp_path / "m", lambda t: t.update(buffers)))


def tie(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({**read_config(folder), "tie_word_embeddings": True}))
    return folder


def test_a_tied_head_may_be_stored_a_second_time_if_it_is_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    def copy_embedding(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    params = load(tie(changed(tiny_llama, tmp_path / "m", copy_embedding)))
    assert "head" not in params


def test_a_tied_head_that_differs_from_the_embedding_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tie(Path(shutil.copytree(tiny_llama, tmp_path / "m")))
    assert refused(folder).startswith(
        "FOLDER: lm_head.weight differs from model.embed_tokens.weight though config.json ties"
    )


def test_a_tensor_that_the_index_promises_and_no_file_holds_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    save(tmp_path / "m", load(tiny_llama), like=tiny_llama, max_shard_bytes=10_000)
    index = tmp_path / "m/model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra"] = "model-00001-of-00006.safetensors"
    index.write_text(json.dumps(content))
    assert "index.json lists model.extra of model-00001-of-00006.safetensors, which is not there" in refused(
        tmp_path / "m"
    )


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_cut_short_is_refused_wherever_the_cut_is(tiny_llama: Path, tmp_path: Path, keep: int) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    assert re.match(r"FOLDER/model.safetensors: .*cut short.*download it again", refused(folder))


def test_quantised_tensors_are_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    folder = changed(
        tiny_llama, tmp_path / "m", lambda t: t.update({"lm_head.weight": torch.ones(64, 32, dtype=torch.int8)})
    )
    assert "tensor lm_head.weight is stored as I8; allowed: F64, F32, F16, BF16" in refused(folder)


MEMORY = """
import json, resource, sys
from pathlib import Path
import jax
from models.families import decoder_config
from models.decoder import abstract_params
from models.sharding import make_mesh, parameter_shardings
from models.weights import load_params, save_folder
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
hf_config = json.loads((folder / "config.json").read_text())
config = decoder_config(hf_config)
shardings = parameter_shardings(abstract_params(config, dtype="float32"), make_mesh({"fsdp": -1}))
jax.block_until_ready(jax.numpy.ones(3) + 1)
before = peak()
params = load_params(folder, config, shardings=shardings, dtype="float32")
loaded = peak()
save_folder(out, params, config, hf_config=hf_config, dtype="bfloat16")
print(loaded - before, peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.fixture(scope="module")
def smollm2_in_parts(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in some ten files and an index, as larger models come."""
    folder = tmp_path_factory.mktemp("parts") / "model"
    save(folder, load(smollm2_folder), like=smollm2_folder, max_shard_bytes=30_000_000)
    assert len(list(folder.glob("model-*.safetensors"))) >= 8
    return folder


@pytest.mark.parametrize(("model", "devices"), [("folder", 1), ("folder", 8), ("in_parts", 1), ("in_parts", 8)])
def test_host_memory_beyond_the_arrays_stays_below_the_largest_tensor_and_300_mb(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, devices: int
) -> None:
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, request.getfixturevalue(f"smollm2_{model}"), tmp_path / "out"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=True,
    )
    loading, saving, arrays = map(int, done.stdout.split())
    largest = 49152 * 576 * 4
    assert arrays == 134_515_008 * 4
    assert loading <= arrays + largest + 300e6, f"loading took {(loading - arrays) / 1e6:.0f} MB beyond the arrays"
    assert saving <= arrays + largest + 300e6, f"saving took {(saving - arrays) / 1e6:.0f} MB beyond the arrays"


def test_smollm2_goes_in_and_out_byte_for_byte(smollm2_folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "out", load(smollm2_folder), like=smollm2_folder)
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(smollm2_folder)


PROCESS = """
import json, sys
from pathlib import Path
import jax
import numpy as np
rank, port, folder, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
from models.families import decoder_config
from models.decoder import abstract_params
from models.sharding import make_mesh, parameter_shardings
from models.weights import load_params, save_folder
hf_config = json.loads((folder / "config.json").read_text())
config = decoder_config(hf_config)
shardings = parameter_shardings(abstract_params(config, dtype="float32"), make_mesh({"fsdp": 2, "tensor": 2}))
params = load_params(folder, config, shardings=shardings, dtype="float32")
assert not params["head"]["kernel"].is_fully_addressable
save_folder(out, params, config, hf_config=hf_config, dtype="bfloat16", max_shard_bytes=10_000)
assert (out / "config.json").is_file()  # for every process, once the call is over
"""


def test_two_processes_read_their_own_shards_and_one_writes_the_whole_model(tiny_llama: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = "--xla_force_host_platform_device_count=2"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), port, tiny_llama, tmp_path / "out"],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tiny_llama)
