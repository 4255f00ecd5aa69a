"""`einkorn chat` and `einkorn generate`: a model folder answers."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from input_pipeline.processors import Processor, open_processor
from input_pipeline.tokenizer import load_tokenizer
from launch.adapt import Named, tokenizer_folder
from launch.pictures import Question, message, question
from models import hub, weights
from models.adapter import base_of, find_adapter, join_adapter
from models.decoder import DecoderConfig, Params, abstract_params
from models.families import decoder_config
from models.generate import Sampling, stop_ids_of, stream
from models.generate import generate as generate_ids
from models.sharding import make_mesh, parameter_shardings


class Options(NamedTuple):
    """How answers are drawn."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int

    def drawn(self, *, after: int = 0) -> dict[str, Any]:
        """What `generate` and `stream` are told; every message that went before changes the seed."""
        sampling = Sampling(self.temperature, self.top_k, self.top_p)
        return {"max_new_tokens": self.max_new_tokens, "sampling": sampling, "seed": self.seed + after}


class Talker(NamedTuple):
    """A model ready to answer."""

    params: Params
    config: DecoderConfig
    tokenizer: Any
    stop_ids: set[int]
    processor: Processor | None  # of its pictures; None: it takes none

    def question(self, messages: Sequence[dict[str, Any]]) -> Question:
        """What the model is given: through the chat template, or the last message alone where there is none."""
        if any(not isinstance(message["content"], str) for message in messages):
            if self.processor is None or not self.tokenizer.chat_template:
                lacks = "vision tower" if self.processor is None else "chat template"
                raise ValueError(f"--image: this model has no {lacks}; name one that sees, or leave out --image")
            return question(messages, self.tokenizer, self.processor)
        if not self.tokenizer.chat_template:
            return Question(self.tokenizer(messages[-1]["content"])["input_ids"], None)
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return Question(self.tokenizer(text, add_special_tokens=False)["input_ids"], None)


def open_talker(name: str) -> Talker:
    """Load a model folder (or hub name) with all its weights, in the dtype they are stored in, on the devices there
    are; an adapter's folder is the model it belongs to with the adapter merged in.
    """
    adapter = find_adapter(name)
    named = Named(name if adapter is None else base_of(adapter), adapter)
    folder = hub.resolve(named.base)
    hf_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = decoder_config(hf_config)
    dtype = jnp.dtype(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32")
    if jax.default_backend() == "cpu":
        dtype = jnp.dtype("float32")  # CPUs compute bfloat16 by way of float32, much slower
    mesh = make_mesh({"fsdp": -1})
    shardings = parameter_shardings(abstract_params(config, dtype=dtype), mesh)
    params = weights.load_params(folder, config, shardings=shardings, dtype=dtype)
    if adapter is not None:
        params = join_adapter(adapter, params, config, hf_config, mesh=mesh)
    tokenizer = load_tokenizer(str(tokenizer_folder(named, folder)))
    processor = None if config.vision is None else open_processor(hf_config, folder, tokenizer)
    return Talker(params, config, tokenizer, stop_ids_of(_generation_config(folder), tokenizer), processor)


def generate(
    name: str, prompts: Sequence[str], *, system: str | None, images: Sequence[Path], options: Options
) -> None:
    """Print the answer to each prompt about these pictures, under the prompt where there are several."""
    talker = open_talker(name)
    asked = [talker.question([*_system(system), message(prompt, images)]) for prompt in prompts]
    answers = generate_ids(
        talker.params,
        talker.config,
        [one.ids for one in asked],
        stop_ids=talker.stop_ids,
        shown=[one.shown for one in asked],
        **options.drawn(),
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        if len(prompts) > 1:
            print(f"> {prompt}")
        print(talker.tokenizer.decode(answer, skip_special_tokens=True))


def chat(
    name: str,
    *,
    system: str | None,
    images: Sequence[Path],
    options: Options,
    ask: Callable[[str], str] = input,
) -> None:
    """Read a line, stream the answer, and so on with the whole conversation; an empty line or the end of input ends.
    The first line is about these pictures.
    """
    talker = open_talker(name)
    print(f"{name}: an empty line ends.", file=sys.stderr)
    messages: list[dict[str, Any]] = [*_system(system)]
    while said := _line(ask):
        messages.append(message(said, images if len(messages) <= bool(system) else ()))
        asked = talker.question(messages)
        tokens = stream(
            talker.params,
            talker.config,
            asked.ids,
            stop_ids=talker.stop_ids,
            shown=asked.shown,
            **options.drawn(after=len(messages)),
        )
        answer: list[int] = []
        shown = ""
        for token in tokens:
            answer.append(token)
            text = talker.tokenizer.decode(answer, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # the last token may hold a part of a character only
                print(text[len(shown) :], end="", flush=True)
                shown = text
        print()
        messages.append({"role": "assistant", "content": shown})


def _line(ask: Callable[[str], str]) -> str:
    try:
        return ask("you: ").strip()
    except EOFError:
        return ""


def _system(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _generation_config(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
