"""`einkorn export`: the model of a checkpoint as a Hugging Face folder."""

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp

from input_pipeline.tokenizer import load_tokenizer
from models import weights
from models.decoder import abstract_params
from models.families import decoder_config
from models.sharding import make_mesh, parameter_shardings
from trainers.checkpoint import read_meta, restore_part
from trainers.checkpoint_files import refuse_damaged

log = logging.getLogger("einkorn")


def run(checkpoint: Path, folder: Path, *, dtype: str | None) -> None:
    """Write `folder` from the parameters in `checkpoint`, in their own dtype unless another is given."""
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--dtype is {dtype!r}; allowed: float32, bfloat16")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not empty; name another folder")
    refuse_damaged(checkpoint)
    model = read_meta(checkpoint)["model"]
    config = decoder_config(model["hf_config"])
    stored = abstract_params(config, dtype=jnp.dtype(model["dtype"]))
    shardings = parameter_shardings(stored, make_mesh({"fsdp": -1}))
    wanted = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), stored, shardings
    )
    params = restore_part(checkpoint, "params", wanted)
    original = Path(model["folder"])
    generation = original / "generation_config.json"
    weights.save_folder(
        folder,
        params,
        config,
        hf_config=model["hf_config"],
        dtype=dtype or model["dtype"],
        tokenizer=load_tokenizer(str(original), chat_template=model["chat_template"]) if original.is_dir() else None,
        generation_config=json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else None,
    )
    log.info("%s holds the model of %s", folder, checkpoint)
