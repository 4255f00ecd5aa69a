"""SmolLM 3: Llama of which every fourth layer does not rotate positions."""

from models.config import DecoderConfig, Layer
from models.families import Fields, llama

WEIGHTS, IGNORED = llama.WEIGHTS, llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `SmolLM3Config`."""
    fields.expect("pretraining_tp", 1)
    period, slides = fields.get("no_rope_layer_interval", 4), fields.get("use_sliding_window", False)
    rotates = [bool(one) for one in fields.get("no_rope_layers", llama.all_but_every(fields, period))]
    window, rotation = fields.get("sliding_window", None), llama.rope(fields, theta=2_000_000.0)
    near = llama.sliding(fields, [slides and window is not None and not one for one in rotates])
    bias = fields.get("attention_bias", False)
    return llama.plain(
        fields,
        each=[
            Layer(window if slides and one else None, rotation if turns else None)
            for one, turns in zip(near, rotates, strict=True)
        ],
        tied=True,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.get("mlp_bias", False),
    )
