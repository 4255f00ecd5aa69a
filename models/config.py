"""What a model is and how it is computed: two frozen, hashable records that every jitted function of a model is
compiled for.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp

from models.rope import Rope


class Layer(NamedTuple):
    """What may differ from layer to layer: how many tokens back it looks, itself included (None: all), how it rotates
    positions (None: not at all), and whether it looks at pictures, and not at text.
    """

    window: int | None
    rope: Rope | None
    looks: bool = False


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What a checkpoint decides: the sizes, and below them switches that stand at the plain pre-norm decoder (Llama).

    A family turns the switches that its model has; models/README.md lists who uses which.
    """

    vocabulary: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    activation: str  # a name of models.activations.ACTIVATIONS
    norm_eps: float
    tied_head: bool
    initializer_range: float
    each: tuple[Layer, ...]  # one for each layer

    # Norms
    norm: str = "rms"  # a name of models.layers.NORMS
    norm_bias: bool = False
    in_norms: bool = True  # attention and MLP read a normed stream
    out_norms: bool = False  # what they add to the stream is normed
    parallel: str = ""  # attention and MLP both read the stream before either adds: through "one norm" or "two norms"
    # Attention
    qkv_bias: bool = False
    o_bias: bool = False
    fused_qkv: str = ""  # one matrix for all three: "blocks" q | k | v, or "heads": q, k, v of head 0, of head 1, …
    qk_norm: str = (
        ""  # of queries and keys: over each "head", with a scale for each of the "heads", or over the "width"
    )
    qk_norm_bias: bool = False
    sinks: bool = False  # each head may attend to nothing, at a learned score (arXiv:2309.17453)
    attention_scale: float | None = None  # None: 1 / sqrt(head_width)
    attention_softcap: float | None = None  # scores s become c tanh(s / c)
    looks: bool = False  # keys and values are of pictures' features
    gates: bool = False  # what attention and MLP add is multiplied by the tanh of a number each
    # MLP
    gated: bool = True
    fused_gate_up: bool = False  # one matrix for both: gate | up
    mlp_bias: bool = False
    experts: Any = None  # a models.moe.Experts: a mixture in the place of the MLP
    # Stream and vocabulary
    more_tokens: int = 0  # that the embedding has beyond the vocabulary: these are never said
    padding_token: int | None = None  # its lookup has no gradient, as in torch's Embedding(padding_idx=…)
    learned_positions: int = 0  # rows of a table of positions that is added to the embedding
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    head_bias: bool = False
    vision: Any = None  # a models.vision.Vision: features of pictures stand among the embeddings

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self.each)

    def stack(self, *, looks: bool) -> "DecoderConfig":
        """The layers that look at pictures or those that do not, which are stacked apart."""
        if not any(layer.looks for layer in self.each):
            return self if not looks else replace(self, each=())
        each = tuple(layer for layer in self.each if layer.looks == looks)
        if not looks:
            return replace(self, each=each)
        return replace(self, each=each, looks=True, gates=True, qk_norm="head", fused_qkv="", fused_gate_up=False)


@dataclass(frozen=True)
class Compute:
    """How to compute, which no checkpoint decides: dtype of activations, attention backend, what to recompute, layers
    in one scan step, the longest document of a row (None: the row may be one), beyond which nobody looks back, whether
    a row may hold several documents (not `packed`, it is one from its first place on, with nothing but padding behind),
    and how an adapter acts (a models.lora.Lora).
    """

    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    scan_unroll: int = 1
    longest_document: int | None = None
    packed: bool = True
    lora: Any = None
