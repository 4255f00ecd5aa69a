"""GPT-2 and DistilGPT-2: learned positions, layer norms, one matrix for queries, keys and values; kernels stored as
[in, out].
"""

from models.activations import ACTIVATIONS
from models.config import DecoderConfig, Layer
from models.families import AsStored, Fields

WEIGHTS = {
    "embed/embedding": "transformer.wte.weight",
    "positions/embedding": "transformer.wpe.weight",
    "layers/input_norm/scale": "transformer.h.{i}.ln_1.weight",
    "layers/input_norm/bias": "transformer.h.{i}.ln_1.bias",
    "layers/attention/qkv/kernel": AsStored("transformer.h.{i}.attn.c_attn.weight"),
    "layers/attention/qkv/bias": "transformer.h.{i}.attn.c_attn.bias",
    "layers/attention/o/kernel": AsStored("transformer.h.{i}.attn.c_proj.weight"),
    "layers/attention/o/bias": "transformer.h.{i}.attn.c_proj.bias",
    "layers/post_norm/scale": "transformer.h.{i}.ln_2.weight",
    "layers/post_norm/bias": "transformer.h.{i}.ln_2.bias",
    "layers/mlp/up/kernel": AsStored("transformer.h.{i}.mlp.c_fc.weight"),
    "layers/mlp/up/bias": "transformer.h.{i}.mlp.c_fc.bias",
    "layers/mlp/down/kernel": AsStored("transformer.h.{i}.mlp.c_proj.weight"),
    "layers/mlp/down/bias": "transformer.h.{i}.mlp.c_proj.bias",
    "norm/scale": "transformer.ln_f.weight",
    "norm/bias": "transformer.ln_f.bias",
    "head/kernel": "lm_head.weight",
}
IGNORED = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",)


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `GPT2Config`."""
    fields.dropout("resid_pdrop", "embd_pdrop", "attn_pdrop")
    for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"):
        fields.get(f"summary_{name}", None)  # a head that language models do not have
    fields.get("n_ctx", None)
    fields.expect("scale_attn_weights", True)
    fields.expect("scale_attn_by_inverse_layer_idx", False)
    fields.get("reorder_and_upcast_attn", False)  # scores and softmax are float32 here in any case
    fields.expect("add_cross_attention", False)
    fields.expect("activation_function", "gelu_new", *ACTIVATIONS)
    width, heads = fields["n_embd"], fields["n_head"]
    return DecoderConfig(
        vocabulary=fields["vocab_size"],
        width=width,
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        mlp_width=fields.get("n_inner", 4 * width),
        activation=fields.get("activation_function", "gelu_new"),
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        tied_head=fields.get("tie_word_embeddings", True),
        initializer_range=fields.get("initializer_range", 0.02),
        each=(Layer(None, None),) * fields["n_layer"],
        norm="layer",
        norm_bias=True,
        qkv_bias=True,
        o_bias=True,
        fused_qkv="blocks",
        gated=False,
        mlp_bias=True,
        learned_positions=fields["n_positions"],
    )
