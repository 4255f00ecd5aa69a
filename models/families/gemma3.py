"""Gemma 3 with its eyes: a SigLIP tower whose patches are averaged to 256 features, which see one another both ways."""

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from typing import Any

from models import towers
from models.config import DecoderConfig
from models.families import AsStored, Fields, Table, decoder_config, prefixed, table_of
from models.families.llava import LOADED, RENAMED
from models.vision import Vision

PROJECTOR = {
    "projector/norm/scale": "multi_modal_projector.mm_soft_emb_norm.weight",
    "projector/up/kernel": AsStored("multi_modal_projector.mm_input_projection_weight"),
}


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `Gemma3Config`, with its tower."""
    text, vision = decoder_config(fields.nested("text_config")), fields.inside("vision_config")
    for name in ("image_token_index", "boi_token_index", "eoi_token_index"):
        fields.get(name, None)  # of what is done with texts and pictures before the model
    tied = fields.get("tie_word_embeddings", True)
    tower = Vision(
        **towers.tower(vision),
        takes=None,
        drops_class=False,
        projector="pooled",
        pooled=isqrt(fields.get("mm_tokens_per_image", 256)),
    )
    vision.finish()
    return replace(text, vision=tower, tied_head=tied)


def table(hf_config: Mapping[str, Any]) -> Table:
    """The text family's table and the tower's."""
    fields = Fields(hf_config)
    text = prefixed(table_of(fields.nested("text_config")), "language_model.")
    names = {path: type(name)(f"vision_tower.{name}") for path, name in towers.SIGLIP.items()}
    return Table({**text.names, **names, **PROJECTOR}, text.ignored, RENAMED, LOADED)
