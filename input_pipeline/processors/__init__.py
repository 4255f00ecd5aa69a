"""Pictures as each model takes them: a model's `model_type` → how its pictures become patches and placeholder tokens.

Resizing, cropping and normalising are those of the model's own image processor in transformers, by its class that needs
numpy and Pillow alone. What a picture's placeholder becomes in the text is computed here. A new family is one new file
with `open(settings)`, and its line in `FAMILIES`.
"""

import difflib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from input_pipeline.processors.processor import Prepared, Processor, Settings, settings_known

__all__ = ["FAMILIES", "Prepared", "Processor", "open_processor"]

FAMILIES = {
    "llava": "input_pipeline.processors.llava",
    "qwen2_vl": "input_pipeline.processors.qwen_vl",
    "qwen2_5_vl": "input_pipeline.processors.qwen_vl",
    "qwen3_vl": "input_pipeline.processors.qwen_vl",
    "mllama": "input_pipeline.processors.mllama",
    "gemma3": "input_pipeline.processors.gemma3",
    "paligemma": "input_pipeline.processors.paligemma",
    "idefics3": "input_pipeline.processors.idefics3",
    "smolvlm": "input_pipeline.processors.idefics3",
}
_FILES = ("processor_config.json", "preprocessor_config.json")  # the later one wins where both say something


def open_processor(
    hf_config: Mapping[str, Any], folder: str | Path, tokenizer: Any, *, kwargs: Mapping[str, Any] | None = None
) -> Processor | None:
    """How the pictures of a model are prepared, from its configuration, and the settings of its image processor in
    `folder` with `kwargs` over them; None for a model that takes no pictures."""
    if "vision_config" not in hf_config:
        if kwargs:
            raise ValueError(f"model.processor_kwargs: a {hf_config.get('model_type')} takes no pictures")
        return None
    family = hf_config.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise NotImplementedError(f"not implemented yet: pictures for model_type {family!r}; there are {known}")
    settings = Settings(dict(hf_config), _image_settings(Path(folder), dict(kwargs or {})), tokenizer)
    processor = importlib.import_module(FAMILIES[family]).open(settings)
    has = settings_known(type(processor.image))
    for key in kwargs or {}:
        if key not in has:
            near = difflib.get_close_matches(key, has, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has: {', '.join(sorted(has))}"
            raise ValueError(f"model.processor_kwargs.{key} is no setting of {type(processor.image).__name__}{hint}")
    return processor


def _image_settings(folder: Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the model's folder says of its image processor."""
    found: dict[str, Any] = {}
    seen = False
    for name in _FILES:
        file = folder / name
        if file.is_file():
            said = json.loads(file.read_text(encoding="utf-8"))
            found |= said.get("image_processor", {} if name == _FILES[0] else said)
            seen |= name == _FILES[1] or "image_processor" in said
    if not seen:
        raise ValueError(
            f"{folder} has no preprocessor_config.json (nor an image_processor in processor_config.json), which says"
            " how pictures are resized and normalised; name a folder that has one in model.processor_name"
        )
    return found | kwargs
