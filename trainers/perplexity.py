"""How well a model predicts text: perplexity, and bits per byte, which compares models of different tokenizers."""

import math
from collections.abc import Mapping

from trainers.losses import Sum


def text_measures(sums: Mapping[str, Sum], *, text_bytes: int | None = None) -> dict[str, float]:
    """What an evaluation's `loss` in nats says about its text.

    `perplexity` is e to the mean over tokens. `bits_per_byte` is the total in bits over the UTF-8 bytes of the text,
    where `text_bytes` gives them: the first token of a document, which nothing predicts, adds to the bytes only.
    """
    nats, tokens = float(sums["loss"].total), float(sums["loss"].count)
    mean = nats / max(tokens, 1.0)
    measures = {"perplexity": math.exp(mean) if mean < 700 else math.inf}
    if text_bytes:
        measures["bits_per_byte"] = nats / math.log(2) / text_bytes
    return measures
