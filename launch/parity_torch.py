"""The other side of `einkorn parity`: what transformers computes on torch. This module alone of the program imports
torch, and only that command imports this module.
"""

import gc
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from launch.parity_einkorn import Measured, Sample
from models.families import table_of


def measure_transformers(folder: Path, sample: Sample, dtypes: Sequence[str]) -> Iterator[Measured]:
    """The numbers of transformers on CPU, in one dtype after the other; one model at a time is held.

    Raises ValueError where transformers itself finds weights missing and would draw them at random.
    """
    for dtype in dtypes:
        model = _load(folder, getattr(torch, dtype))
        with torch.no_grad():
            short = _last_logits(model, sample.text[: sample.shown], sample.shown)
            long = _last_logits(model, sample.text, sample.shown)
            continued = [_continue(model, prompt, sample.new) for prompt in sample.prompts]
        loss, gradient = _loss_and_norms(model, sample.trained, _paths_by_name(model, folder))
        del model
        gc.collect()  # modules refer to one another in circles: without this the next one is loaded beside them
        tokens, margins = zip(*continued, strict=True)
        yield Measured(short, long, loss, gradient, list(tokens), list(margins))


def _load(folder: Path, dtype: torch.dtype) -> Any:
    transformers.utils.logging.disable_progress_bar()
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(folder, dtype=dtype, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder}: transformers finds no {', '.join(missing[:3])} in it, and would draw it at random")
    return model.eval()


def _paths_by_name(model: Any, folder: Path) -> dict[str, str]:
    """Our path of each parameter that belongs to no layer, by its name in transformers, which is that of its tensor in
    the files, but for some heads, as GPT-NeoX's.
    """
    table = table_of(json.loads((folder / "config.json").read_text(encoding="utf-8"))).names
    path_of = {name: path for path, name in table.items() if not path.startswith("layers/")}
    ends = {"head/kernel": model.get_output_embeddings(), "embed/embedding": model.get_input_embeddings()}
    for path, module in ends.items():  # a tied head comes out as the embedding
        path_of |= {name: path for name, parameter in model.named_parameters() if parameter is module.weight}
    return path_of


def _last_logits(model: Any, ids: Sequence[int], last: int) -> np.ndarray:
    return model(torch.tensor([ids]), logits_to_keep=last, use_cache=False).logits[0].float().numpy()


def _continue(model: Any, prompt: Sequence[int], new: int) -> tuple[list[int], list[float]]:
    """`new` greedy tokens whatever they are, and by how much each one's logit exceeds the second best."""
    tokens: list[int] = []
    margins: list[float] = []
    for _ in range(new):  # all of it anew: what a cache is called is not the same in all versions
        logits_V = _last_logits(model, [*prompt, *tokens], last=1)[-1]
        second, best = np.sort(logits_V)[-2:]
        tokens.append(int(logits_V.argmax()))
        margins.append(float(best - second))
    return tokens, margins


def _loss_and_norms(model: Any, ids: Sequence[int], path_of: dict[str, str]) -> tuple[float, dict[str, float]]:
    """The loss of training, and norms of its gradient by layer number or path; the gradient itself is dropped."""
    tokens_BL = torch.tensor([ids])
    loss = model(tokens_BL, labels=tokens_BL, use_cache=False).loss
    loss.backward()
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        layer = re.search(r"\.(\d+)\.", name)
        group = f"layer {layer[1]}" if layer else path_of.get(name, name)
        norm = 0.0 if parameter.grad is None else float(torch.linalg.vector_norm(parameter.grad))
        squares[group] = squares.get(group, 0.0) + norm**2
        parameter.grad = None
    return loss.item(), {group: square**0.5 for group, square in squares.items()}
