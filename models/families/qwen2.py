"""Qwen 2 and 2.5, QwQ, R1 distills on Qwen: Llama with biases on queries, keys and values."""

from models.config import DecoderConfig, Layer
from models.families import Fields, llama

WEIGHTS, IGNORED = llama.WEIGHTS, llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `Qwen2Config`."""
    return llama.plain(fields, each=layers(fields), qkv_bias=True)


def layers(fields: Fields) -> list[Layer]:
    """The layers: with `use_sliding_window` those from `max_window_layers` on have a window."""
    first = fields.get("max_window_layers", 28)
    if not fields.get("use_sliding_window", False):
        fields.get("sliding_window", None), fields.get("layer_types", None)
        return [Layer(None, llama.rope(fields))] * fields["num_hidden_layers"]
    return llama.windows(fields, llama.sliding(fields, [i >= first for i in range(fields["num_hidden_layers"])]))
