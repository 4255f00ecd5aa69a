"""PaliGemma 1 and 2: a SigLIP tower, one linear layer, and Gemma; all of a prompt sees all of it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models import towers
from models.config import DecoderConfig
from models.families import Fields, Table, decoder_config, prefixed, table_of
from models.families.llava import LOADED, RENAMED
from models.vision import Vision

SAID_ELSEWHERE = ("use_bidirectional_attention", "num_image_tokens")
PROJECTOR = {
    "projector/up/kernel": "multi_modal_projector.linear.weight",
    "projector/up/bias": "multi_modal_projector.linear.bias",
}


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `PaliGemmaConfig`, with its tower."""
    inner, vision = fields.nested("text_config"), fields.inside("vision_config")
    # The prompt sees all of itself by the groups of a batch; its number of pictures' features is the tower's.
    text = decoder_config({name: inner[name] for name in inner if name not in SAID_ELSEWHERE})
    for name in ("image_token_index", "vocab_size", "projection_dim", "hidden_size", "num_image_tokens"):
        fields.get(name, None)  # said again by its parts, or of what is done before the model
    vision.get("num_image_tokens", None)
    tied = fields.get("tie_word_embeddings", True)
    vision.get("projection_dim", None)
    tower = Vision(**towers.tower(vision), takes=None, drops_class=False, projector="linear", projector_bias=True)
    vision.finish()
    return replace(text, vision=tower, tied_head=tied)


def table(hf_config: Mapping[str, Any]) -> Table:
    """The text family's table and the tower's."""
    fields = Fields(hf_config)
    text = prefixed(table_of(fields.nested("text_config")), "language_model.")
    names = {path: type(name)(f"vision_tower.{name}") for path, name in towers.SIGLIP.items()}
    return Table({**text.names, **names, **PROJECTOR}, text.ignored, RENAMED, LOADED)
