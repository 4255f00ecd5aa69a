"""Idefics3 and SmolVLM: tiles of large pictures through a SigLIP-like tower, neighbouring patches joined to one of
the features, and llama.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models import towers
from models.config import DecoderConfig
from models.families import Fields, Table, decoder_config, table_of
from models.vision import Vision

PROJECTOR = {"projector/up/kernel": "model.connector.modality_projection.proj.weight"}


def config(fields: Fields) -> DecoderConfig:
    """The decoder of an `Idefics3Config` or a `SmolVLMConfig`, with its tower."""
    text, vision = decoder_config(fields.nested("text_config")), fields.inside("vision_config")
    for name in ("image_token_id", "_pad_token_id", "vocab_size", "qk_layer_norms", "perceiver_config"):
        fields.get(name, None)  # of Idefics2, and of what is done before the model
    fields.expect("use_resampler", False)
    for name in ("max_image_size", "size", "use_base_siglip", "tie_word_embeddings"):
        vision.get(name, None)
    tied = fields.get("tie_word_embeddings", False) or text.tied_head
    tower = Vision(
        **towers.tower(vision, "idefics3_vision"),
        takes=None,
        drops_class=False,
        fractions=True,
        projector="joined",
        pooled=fields.get("scale_factor", 2),
    )
    vision.finish()
    return replace(text, vision=tower, tied_head=tied)


def table(hf_config: Mapping[str, Any]) -> Table:
    """The text family's table, whose names have a word more, and the tower's."""
    text = table_of(Fields(hf_config).nested("text_config"))
    inner = {
        path: type(name)(name.replace("model.", "model.text_model.", 1)) if name.startswith("model.") else name
        for path, name in text.names.items()
    }
    names = {path: type(name)(f"model.vision_model.{name}") for path, name in towers.SIGLIP.items()}
    ignored = [pattern.replace(r"model\.", r"model\.text_model\.", 1) for pattern in text.ignored]
    return Table({**inner, **names, **PROJECTOR}, ignored)
