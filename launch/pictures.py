"""Pictures of prompts that are asked by hand: a conversation with files → token ids, and what the model sees."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from input_pipeline.examples import Prompt, RowError
from input_pipeline.formats.conversation import parse_messages
from input_pipeline.images import Opener
from input_pipeline.pictures import Pictures
from input_pipeline.processors.processor import Prepared, Processor
from input_pipeline.template import Template
from models.vision import Shown


class Question(NamedTuple):
    """A prompt's token ids, and its pictures."""

    ids: list[int]
    shown: Shown | None


def shown_of(processor: Processor | None, ids: Sequence[int], pictures: Prepared | None) -> Shown | None:
    """A prompt's pictures as generation takes them, whose features stand where its ids say."""
    if pictures is None:
        return None
    assert processor is not None
    beside = processor.token_arrays(np.asarray(ids, np.int32), 0, pictures)
    of_tokens = (beside.get(name) for name in ("image_features", "groups", "axes"))
    shown = Shown(pictures.patches, pictures.segments, pictures.places, *of_tokens)
    return shown._replace(tiles=pictures.more.get("patch_tiles"), looks=beside.get("cross_images"))


def message(text: str, files: Sequence[Path]) -> dict[str, Any]:
    """What a user says about these pictures; ValueError where a file is not there."""
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ValueError(f"--image: there is no file {missing[0]}")
    parts = [{"type": "image_binary", "binary": file.read_bytes()} for file in files]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def question(messages: Sequence[dict[str, Any]], tokenizer: Any, processor: Processor) -> Question:
    """A conversation with pictures up to where the answer begins; ValueError says what is wrong with one of them."""
    try:
        asked = Prompt(prompt=parse_messages(list(messages), "messages"), columns={})
        pictures, template = Pictures(processor, (Opener(),)), Template(tokenizer, processor.placeholder)
        placeholders = pictures.placeholders(asked, 0)
        text = template.text(template.prepare(asked.prompt), prompt=True)  # type: ignore[arg-type]  # messages
        if placeholders is not None:
            placeholders.check(text)
            text = placeholders.expand(text)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return Question(ids, None if placeholders is None else shown_of(processor, ids, pictures.prepare(asked, 0)))
    except RowError as error:
        raise ValueError(str(error)) from error
