"""LLaVA 1.5 and its kin: a CLIP or SigLIP tower, two linear layers, and any text model of these families."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models import towers
from models.activations import ACTIVATIONS
from models.config import DecoderConfig
from models.families import Fields, Table, decoder_config, prefixed, table_of
from models.vision import Vision

PROJECTOR = {
    f"projector/{ours}/{leaf}": f"multi_modal_projector.{theirs}.{name}"
    for ours, theirs in (("up", "linear_1"), ("down", "linear_2"))
    for leaf, name in (("kernel", "weight"), ("bias", "bias"))
}
RENAMED = (  # what older files, and newer models in memory, call a tensor
    (r"^model\.(language_model|vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
LOADED = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|vision_model|multi_modal_projector)\.", r"model.\1."),
)


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `LlavaConfig`, with its tower."""
    text, vision = decoder_config(fields.nested("text_config")), fields.inside("vision_config")
    fields.expect("projector_hidden_act", "gelu", *ACTIVATIONS)
    fields.expect("vision_feature_select_strategy", "default", "full")
    tied = fields.get("tie_word_embeddings", False) or text.tied_head
    for name in ("image_token_index", "image_token_id", "image_seq_length", "image_grid_pinpoints"):
        fields.get(name, None)  # of what is done with texts and pictures before the model
    fields.get("vocab_size", None)
    made = towers.tower(vision)
    tower = Vision(
        **made,
        takes=towers.outputs(made["layers"].layers, fields.get("vision_feature_layer", -2)),
        drops_class=fields.get("vision_feature_select_strategy", "default") == "default",
        projector="mlp",
        projector_bias=fields.get("multimodal_projector_bias", True),
        activation=fields.get("projector_hidden_act", "gelu"),
    )
    vision.finish()
    return replace(text, vision=tower, tied_head=tied)


def table(hf_config: Mapping[str, Any]) -> Table:
    """The text family's table and the tower's."""
    fields = Fields(hf_config)
    text = prefixed(table_of(fields.nested("text_config")), "language_model.")
    tower = towers.WEIGHTS[fields.inside("vision_config")["model_type"]]
    names = {path: type(name)(f"vision_tower.{name}") for path, name in tower.items()}
    ignored = (*text.ignored, r"vision_tower\.embeddings\.position_ids", r"vision_tower\.head\..*")
    return Table({**text.names, **names, **PROJECTOR}, ignored, RENAMED, LOADED)
