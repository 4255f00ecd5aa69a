"""GPT-OSS: experts with biases and a clamped activation, attention sinks, yarn, a window in every other layer.

Weights in MXFP4, as OpenAI publishes them, are not implemented; a folder in bfloat16 is.
"""

from models.config import DecoderConfig
from models.families import AsStored, Fields, llama, mixtral
from models.moe import Experts

WEIGHTS = llama.WEIGHTS | {
    "layers/attention/sinks": "model.layers.{i}.self_attn.sinks",
    "layers/moe/router/kernel": "model.layers.{i}.mlp.router.weight",
    "layers/moe/router/bias": "model.layers.{i}.mlp.router.bias",
    "layers/moe/experts/gate_up/kernel": AsStored("model.layers.{i}.mlp.experts.gate_up_proj"),
    "layers/moe/experts/gate_up/bias": "model.layers.{i}.mlp.experts.gate_up_proj_bias",
    "layers/moe/experts/down/kernel": AsStored("model.layers.{i}.mlp.experts.down_proj"),
    "layers/moe/experts/down/bias": "model.layers.{i}.mlp.experts.down_proj_bias",
}
IGNORED = llama.IGNORED


def config(fields: Fields) -> DecoderConfig:
    """The decoder of a `GptOssConfig`."""
    fields.expect("swiglu_alpha", 1.702)
    fields.expect("swiglu_limit", 7.0)
    fields.get("experts_per_token", None)  # the same as num_experts_per_tok, in the published files
    fields.get("initial_context_length", None)  # original_max_position_embeddings, once more
    bias = fields.get("attention_bias", True)
    return llama.plain(
        fields,
        each=llama.windows(fields, llama.sliding(fields, llama.all_but_every(fields, 2)), theta=150_000.0),
        qkv_bias=bias,
        o_bias=bias,
        sinks=True,
        experts=Experts(
            count=fields["num_local_experts"],
            per_token=fields["num_experts_per_tok"],
            width=fields["intermediate_size"],
            score="softmax_of_chosen",
            router_bias=True,
            expert_bias=True,
            fused="interleaved",
            activation="gpt_oss_clamped",
            aux_coefficient=mixtral.router_loss(fields, 0.001),
        ),
    )
