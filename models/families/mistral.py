"""Mistral: Llama whose layers all look back a window of tokens."""

from models.config import DecoderConfig
from models.families import Fields, llama

WEIGHTS, IGNORED = llama.WEIGHTS, llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `MistralConfig`."""
    return llama.plain(fields, window=fields.get("sliding_window", None))
