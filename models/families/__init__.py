"""Model families: how a Hugging Face `config.json` becomes a `DecoderConfig`, and where each parameter lies in its
files.

A family is one module with `config(fields) -> DecoderConfig`, `WEIGHTS` (path in our tree → Hugging Face tensor name,
`{i}` for the layer, `{e}` for the expert or head where that axis too is spread over several tensors) and `IGNORED`
(patterns of tensors that carry nothing); a model of several parts has in their place `table(hf_config) -> Table`, made
of its parts'. It is found by `model_type`; adding one is a file here and a line below.

Left out, since the decoder could compute them only with a branch for one family alone: mixtures of experts with
ordinary MLPs between them (`mlp_only_layers`, `decoder_sparse_step` of Qwen's), OLMoE with `clip_qkv`, MXFP4 weights.
"""

import importlib
import logging
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

log = logging.getLogger("einkorn")

FAMILIES = {
    "cohere": "models.families.cohere",
    "cohere2": "models.families.cohere2",
    "gemma": "models.families.gemma",
    "gemma2": "models.families.gemma2",
    "gemma3": "models.families.gemma3",
    "gemma3_text": "models.families.gemma3_text",
    "glm4": "models.families.glm4",
    "gpt2": "models.families.gpt2",
    "gpt_neox": "models.families.gpt_neox",
    "gpt_oss": "models.families.gpt_oss",
    "granite": "models.families.granite",
    "idefics3": "models.families.idefics3",
    "llama": "models.families.llama",
    "llava": "models.families.llava",
    "mllama": "models.families.mllama",
    "mistral": "models.families.mistral",
    "mixtral": "models.families.mixtral",
    "olmo2": "models.families.olmo2",
    "olmo3": "models.families.olmo3",
    "olmoe": "models.families.olmoe",
    "paligemma": "models.families.paligemma",
    "phi": "models.families.phi",
    "phi3": "models.families.phi3",
    "qwen2": "models.families.qwen2",
    "qwen2_5_vl": "models.families.qwen2_vl",
    "qwen2_moe": "models.families.qwen2_moe",
    "qwen2_vl": "models.families.qwen2_vl",
    "qwen3": "models.families.qwen3",
    "qwen3_moe": "models.families.qwen3_moe",
    "qwen3_vl": "models.families.qwen3_vl",
    "smolvlm": "models.families.idefics3",
    "smollm3": "models.families.smollm3",
    "stablelm": "models.families.stablelm",
    "starcoder2": "models.families.starcoder2",
}

# Fields that every Hugging Face configuration may carry and that do not change what a forward pass computes.
HARMLESS = frozenset(
    {
        *("model_type", "architectures", "auto_map", "_name_or_path", "transformers_version", "transformers.js_config"),
        *("torch_dtype", "dtype", "max_position_embeddings", "is_llama_config", "_attn_implementation_autoset"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward"),
        *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "initializer_range"),
        *("unsloth_version", "unsloth_fixed", "is_decoder", "prefix", "tokenizer_class", "torchscript"),
        *("use_bfloat16", "tf_legacy_loss"),
        # How to generate, which older files say here; generation_config.json says it to us.
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature"),
        *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "diversity_penalty", "bad_words_ids"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores"),
        *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
        *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    }
)
# What older files say of every model; only another value asks for something.
USUAL: Mapping[str, Any] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}


class AsStored(str):
    """The name of a tensor that the files keep as [in, out] like our kernels, where a linear layer's is [out, in]."""

    __slots__ = ()


class OfLayers(str):
    """The name of a tensor that some layers have, by their numbers in the files, in the order of our stack."""

    layers: tuple[int, ...]

    def __new__(cls, name: str, layers: Sequence[int]) -> "OfLayers":
        made = super().__new__(cls, name)
        made.layers = tuple(layers)
        return made


class Fields:
    """The fields of one `config.json`, remembering which were read, so that an unread one is an error and not a silent
    difference.
    """

    def __init__(self, hf_config: Mapping[str, Any]):
        self._values = dict(hf_config)
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """The value of a field that the family cannot do without."""
        if self._values.get(name) is None:
            raise ValueError(f"config.json of model_type {self._values.get('model_type')!r} lacks the field {name!r}")
        self._read.add(name)
        return self._values[name]

    def nested(self, name: str) -> dict[str, Any]:
        """The configuration of a part of the model; where the file leaves out what is the default of its class, with
        these defaults.
        """
        given = dict(self[name])
        if "hidden_size" in given:
            return given
        from transformers import AutoConfig

        defaults = AutoConfig.for_model(given["model_type"]).to_dict()
        return {key: value for key, value in defaults.items() if value is not None and key not in HARMLESS} | given

    def inside(self, name: str) -> "Fields":
        """The fields of a part of the model."""
        return Fields(self.nested(name))

    def get(self, name: str, default: Any) -> Any:
        """The value of a field, or what transformers takes when it is absent or null."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def expect(self, name: str, *allowed: Any) -> None:
        """Accept a field only where its value asks for nothing that this port does not compute."""
        if (value := self.get(name, allowed[0])) not in allowed:
            raise ValueError(
                f"not implemented yet: {name}: {value!r} in config.json (this port computes {allowed[0]!r} only)"
            )

    def dropout(self, *names: str) -> None:
        """Read rates of dropout: training here is without, and the log says so where the file asks for some."""
        for name in names:
            if self.get(name, 0.0):
                log.warning("config.json: %s %s: dropout inside the model is not applied", name, self._values[name])

    def finish(self) -> None:
        """Raise if a field was neither read nor known to be harmless: it might change the model's numbers."""
        usual = {name for name, value in USUAL.items() if self._values.get(name) == value}
        if unread := sorted(set(self._values) - self._read - HARMLESS - usual):
            kind = self._values.get("model_type")
            raise ValueError(
                f"config.json has fields that the {kind!r} port does not know: {', '.join(unread)}. They could change "
                f"what the model computes; if they do not, list them in models/families/__init__.py:HARMLESS"
            )


def family_for(hf_config: Mapping[str, Any]) -> ModuleType:
    """The family module of a Hugging Face configuration, by its `model_type`."""
    kind = hf_config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"not implemented yet: model_type {kind!r} in config.json; implemented: {', '.join(sorted(FAMILIES))}"
        )
    return importlib.import_module(FAMILIES[kind])


class Table(NamedTuple):
    """How a checkpoint calls its tensors: path in our tree → name, patterns of names that carry nothing, and what other
    files call them instead, as pairs of a pattern and its replacement, applied in order; `loaded` are such pairs from
    the table's names to those that the model has once transformers has loaded it, which are peft's.
    """

    names: Mapping[str, str]
    ignored: Sequence[str]
    renamed: Sequence[tuple[str, str]] = ()
    loaded: Sequence[tuple[str, str]] = ()

    def name_of(self, stored: str) -> str:
        """What this table calls a tensor that a file calls `stored`."""
        return _replaced(stored, self.renamed)

    def name_loaded(self, name: str) -> str:
        """What the loaded model calls a tensor of this table."""
        return _replaced(name, self.loaded)


def _replaced(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in pairs:
        name = re.sub(pattern, replacement, name)
    return name


def table_of(hf_config: Mapping[str, Any]) -> Table:
    """The table of a Hugging Face configuration: its family's own, or what the family makes of its parts'."""
    family = family_for(hf_config)
    return family.table(hf_config) if hasattr(family, "table") else Table(family.WEIGHTS, family.IGNORED)


def prefixed(table: Table, prefix: str) -> Table:
    """The table of a model inside another one."""
    names = {path: type(name)(f"{prefix}{name}") for path, name in table.names.items()}
    return Table(names, [f"{re.escape(prefix)}{pattern}" for pattern in table.ignored])


def decoder_config(hf_config: Mapping[str, Any]) -> Any:
    """The `DecoderConfig` of a Hugging Face configuration; ValueError names any field this port would not honour."""
    if quantised := hf_config.get("quantization_config"):
        raise ValueError(
            f"not implemented yet: weights quantised by {quantised.get('quant_method')!r} (quantization_config in "
            f"config.json); take a folder in bfloat16 or float32"
        )
    fields = Fields(hf_config)
    config = family_for(hf_config).config(fields)
    fields.finish()
    return config
