"""Tokenizers: loaded from a folder or the hub, without torch, with a padding token and a chat template settled."""

import json
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"

_LLAMA3_PAD = (
    "<|finetune_right_pad_id|>"  # reserved for padding in the vocabulary of Llama 3.1 and later, but not named
)
_OF_MODEL_TYPE = {"gpt2": "gpt2", "paligemma": "paligemma"}  # families whose own tokenizer has no chat template


def load_tokenizer(
    folder_or_id: str,
    *,
    chat_template: str | None = None,
    pad_token: str | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> Any:
    """Load a fast tokenizer (one with a tokenizer.json, or that transformers can convert to it).

    `chat_template`: None keeps the tokenizer's own, or takes that of its model type if it has none; "auto" the same,
    and "default" as a last resort; else a name of `template_names()` or the path of a .jinja file. `pad_token`: must be
    in the vocabulary; without it the tokenizer's own, else the one reserved for it (Llama 3), else the end-of-sequence
    token. ValueError says what is allowed.
    """
    import transformers

    source = str(folder_or_id)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision, **kwargs)
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ValueError(
            f"the tokenizer of {source!r} is a slow one ({kind}): it cannot say where in a text a token stands."
            " It needs a tokenizer.json"
        )
    tokenizer.pad_token = _pad_token(tokenizer, pad_token, source)
    tokenizer.chat_template = _chat_template(tokenizer, chat_template, source)
    return tokenizer


def template_names() -> list[str]:
    """Names of the chat templates that come with einkorn."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def read_template(name: str) -> str:
    """The source of a chat template, by name or by the path of a .jinja file."""
    if name.endswith(".jinja"):
        path = Path(name).expanduser()
        if not path.exists():
            raise ValueError(f"chat_template {name!r}: there is no such file (looked in {Path.cwd()})")
        return path.read_text(encoding="utf-8")
    if name not in template_names():
        known = ", ".join(["auto", *template_names()])
        raise ValueError(f"chat_template {name!r} is unknown; known: {known}, or the path of a .jinja file")
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def _pad_token(tokenizer: Any, asked: str | None, source: str) -> str:
    if asked is not None:
        if asked not in tokenizer.get_vocab():
            raise ValueError(f"pad_token {asked!r} is not in the vocabulary of {source!r}; name a token that is")
        return asked
    reserved = _LLAMA3_PAD if _LLAMA3_PAD in tokenizer.get_vocab() else None
    token = tokenizer.pad_token or reserved or tokenizer.eos_token
    if token is None:
        raise ValueError(f"the tokenizer of {source!r} has no padding token; set model.tokenizer_pad_token")
    return token


def _chat_template(tokenizer: Any, asked: str | None, source: str) -> Any:
    if asked not in (None, "auto"):
        return read_template(str(asked))
    if tokenizer.chat_template:
        return tokenizer.chat_template
    beside = Path(source) / "chat_template.json"  # where older folders of vision-language models have it
    if beside.is_file():
        return json.loads(beside.read_text(encoding="utf-8"))["chat_template"]
    name = _OF_MODEL_TYPE.get(_model_type(source), "default" if asked == "auto" else "")
    return read_template(name) if name else None


def _model_type(folder: str) -> str:
    config = Path(folder) / "config.json"
    return json.loads(config.read_text(encoding="utf-8")).get("model_type", "") if config.is_file() else ""
