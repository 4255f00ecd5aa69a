"""What a message says: a string, or a tuple of parts where pictures stand among the text.

A part is `{"type": "text", "text": "…"}` or `{"type": "image", "image": Picture}`. Read are Oumi's parts
(`image_path`, `image_url`, `image_binary` with `content` or `binary`), OpenAI's (`image_url: {url}`), transformers'
(`image` with `image`, `url`, `path` or `base64`), and TRL's, which say `{"type": "image"}` and have their pictures in
the row's column `images`; that column's pictures may also be meant by "<image>" in the text, as in verl's and LLaVA's
rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

from input_pipeline import fields
from input_pipeline.examples import Chat, Completion, Example, Message, Preference, Prompt, RowError, Side, show
from input_pipeline.images import Picture, from_base64

MARK = "<image>"  # in text, a picture of the column
COLUMNS = ("images", "image")
_SIDES = ("messages", "prompt", "chosen", "rejected", "completion")  # fields of examples that hold messages
_UNFILLED = Picture("column", None)


def parse_content(content: Any, path: str) -> str | tuple[Mapping[str, Any], ...]:
    """A string, or a list of items: text only is joined as it stands, with pictures it stays in parts."""
    if isinstance(content, str):
        return fields.text(content, path)
    if isinstance(content, Mapping) and content.get("type"):
        content = [content]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RowError(f"{path} must be a string or a list of items, not {show(content)}")
    parts = [_part(item, f"{path}[{i}]") for i, item in enumerate(content)]
    if all(isinstance(part, str) for part in parts):
        return "".join(parts)
    return tuple(_text(part) if isinstance(part, str) else part for part in parts)


def text_of(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """The text of a message, without its pictures."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text", "") for part in content)


def without_pictures(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with their pictures' places, but not the pictures, as chat templates and rewards are given them."""
    return [
        {**message, "content": [{"type": "image"} if part["type"] == "image" else dict(part) for part in said]}
        if isinstance(said := message.get("content"), tuple)
        else dict(message)
        for message in messages
    ]


def pictures_of(example: Example) -> tuple[Picture, ...]:
    """The pictures of an example, in their order; RowError where an answer to choose from has one."""
    if isinstance(example, Preference) and [*_pictures(example.chosen), *_pictures(example.rejected)]:
        raise RowError("not implemented yet: a picture in chosen or rejected; it may stand in the prompt", "image")
    if isinstance(example, Chat):
        return tuple(_pictures(example.messages))
    return tuple(_pictures(getattr(example, "prompt", ""))) + tuple(_pictures(getattr(example, "completion", "")))


def with_column(example: Example, row: Mapping[str, Any]) -> Example:
    """The example with the pictures of the row's column `images` (or `image`) where they belong: in parts that say
    `{"type": "image"}`; else at "<image>" in the text; else before the first turn of the user's, as in TRL."""
    sides = [name for name in _SIDES if any(field.name == name for field in fields_of(example))]
    asked = sum(picture is _UNFILLED for name in sides for picture in _pictures(getattr(example, name)))
    column = next((name for name in COLUMNS if row.get(name)), None)
    marked = sum(_marks(getattr(example, name)) for name in sides) if column is not None else 0
    if column is None or not (
        sides and (asked or marked or _are_pictures([row[column]] if column == "images" else row[column]))
    ):
        if asked:
            raise RowError(f"{asked} pictures are meant, and the row has no column 'images' with them", "image")
        return example
    given = row[column] if isinstance(row[column], list | tuple) else [row[column]]
    pictures = [to_picture(item, f"{column}[{i}]") for i, item in enumerate(given)]
    if isinstance(example, Completion):  # pictures stand in messages only
        said = ({"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion})
        example, sides = Chat(messages=said, prompt_messages=1), ["messages"]
    if isinstance(example, Prompt):
        example = replace(example, columns={k: v for k, v in example.columns.items() if k != column})
    count = asked or marked or len(pictures)
    if count != len(pictures):
        where = 'parts {"type": "image"}' if asked else f"{MARK} in the text"
        raise RowError(f"{column} has {len(pictures)} pictures, and there are {count} {where}", "image")
    left = iter(pictures)
    if asked or marked:
        return _changed(
            example, **{name: _filled(getattr(example, name), _role(name), left, bool(asked)) for name in sides}
        )
    name = next((name for name in ("messages", "prompt") if name in sides), None)
    if name is None:
        raise RowError(f"{column} has pictures, and a row of this format has no place for them", "image")
    example = _changed(example, **{name: _put_first(getattr(example, name), left)})
    return _changed(example, **{n: _as_messages(getattr(example, n), _role(n)) for n in sides if n != name})


def to_picture(item: Any, path: str) -> Picture:
    """A picture as a column has it: a path or an address, bytes, `{"bytes": …, "path": …}`, or a PIL image."""
    if isinstance(item, Mapping):
        data = item.get("bytes") if item.get("bytes") is not None else item.get("binary")
        if data is not None:
            return _binary(data, path)
        place = next((item[name] for name in ("path", "url", "image", "image_url", "content") if item.get(name)), None)
        return to_picture(place, path)
    if isinstance(item, bytes | bytearray):
        return Picture("bytes", bytes(item))
    if isinstance(item, str) and item:
        fields.text(item, path)
        return Picture("url" if item.partition(":")[0].lower() in ("http", "https", "data", "file") else "path", item)
    if hasattr(item, "convert") and hasattr(item, "size"):
        return Picture("PIL", item)
    raise RowError(f"{path} must be a path, an address or bytes of a picture, not {show(item)}", "image")


def _part(item: Any, path: str) -> Any:
    """The text of an item, or a part with a picture."""
    if isinstance(item, str):
        return fields.text(item, path)
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind is None:
        raise RowError(f"{path} must be an object with type and content, not {show(item)}")
    if isinstance(kind, str) and kind.startswith("image"):
        return {"type": "image", "image": _picture(item, kind, path)}
    if isinstance(kind, str) and kind.startswith(("video", "audio")):
        raise RowError(f"{path}.type is {kind!r}: not implemented yet: training on anything but text and pictures")
    text = item.get("content") if item.get("content") is not None else item.get("text")
    if kind != "text" or not isinstance(text, str):
        raise RowError(f'{path} must be {{"type": "text", "content": "…"}}, not {show(item)}')
    return fields.text(text, path)


def _picture(item: Mapping[str, Any], kind: str, path: str) -> Picture:
    if item.get("binary") is not None:
        return _binary(item["binary"], f"{path}.binary")
    place = next(
        (item[k] for k in ("content", kind, "image", "url", "path", "base64") if item.get(k) is not None), None
    )
    if isinstance(place, Mapping) and place.get("url") is not None:
        place = place["url"]
    if kind == "image_binary" or (place is not None and place is item.get("base64")):
        return _binary(place, path)
    if place is None:
        if kind == "image":
            return _UNFILLED
        raise RowError(f"{path} names no picture: {show(item)}", "image")
    picture = to_picture(place, path)
    return Picture("path", picture.value) if kind == "image_path" and isinstance(place, str) else picture


def _binary(data: Any, path: str) -> Picture:
    if isinstance(data, str) and data.startswith("data:"):
        return Picture("url", data)
    if isinstance(data, str):
        return Picture("bytes", from_base64(data, path))
    if isinstance(data, list) and all(isinstance(byte, int) and 0 <= byte < 256 for byte in data):
        return Picture("bytes", bytes(data))
    if isinstance(data, bytes | bytearray):
        return Picture("bytes", bytes(data))
    raise RowError(f"{path} must be bytes, or base64 of them, not {show(data)}", "image")


def _are_pictures(value: Any) -> bool:
    """Whether a column's value is pictures by its looks; a string alone may be anything."""
    if isinstance(value, list | tuple):
        return all(isinstance(item, str) or _are_pictures(item) for item in value)
    if isinstance(value, Mapping):
        return "bytes" in value or "path" in value
    return isinstance(value, bytes) or (hasattr(value, "convert") and hasattr(value, "size"))


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _contents(side: Any) -> Iterator[Any]:
    if isinstance(side, str):
        yield side
    elif isinstance(side, tuple):
        yield from (message.get("content") for message in side)


def _pictures(side: Any) -> Iterator[Picture]:
    for content in _contents(side):
        if isinstance(content, tuple):
            yield from (part["image"] for part in content if part["type"] == "image")


def _marks(side: Any) -> int:
    return sum(text_of(content).count(MARK) for content in _contents(side))


def _role(name: str) -> str:
    return "user" if name == "prompt" else "assistant"


def _changed(example: Any, **sides: Any) -> Example:
    return replace(example, **sides)


def _as_messages(side: Side, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": side},) if isinstance(side, str) else side


def _filled(side: Any, role: str, left: Iterator[Picture], by_parts: bool) -> Any:
    """A side with pictures in its unfilled parts, or at its marks."""
    messages = _as_messages(side, role)
    changed = []
    for message in messages:
        content = message.get("content")
        if by_parts and isinstance(content, tuple):
            content = tuple(
                {**part, "image": next(left)} if part.get("image") is _UNFILLED else part for part in content
            )
        elif not by_parts and content:
            content = _split(content, left)
        changed.append({**message, "content": content} if content is not None else message)
    return tuple(changed)


def _split(content: Any, left: Iterator[Picture]) -> Any:
    if MARK not in text_of(content):
        return content
    parts: list[dict[str, Any]] = []
    for part in [_text(content)] if isinstance(content, str) else content:
        if part["type"] == "image":
            parts.append(part)
            continue
        for n, piece in enumerate(part["text"].split(MARK)):
            if n:
                parts.append({"type": "image", "image": next(left)})
            if piece:
                parts.append(_text(piece))
    return tuple(parts)


def _put_first(side: Side, left: Iterator[Picture]) -> tuple[Message, ...]:
    """Messages with pictures before the first turn of the user's."""
    messages = list(_as_messages(side, "user"))
    at = next((n for n, message in enumerate(messages) if message["role"] == "user"), None)
    if at is None:
        raise RowError("has pictures, and no turn of the user's to show them in", "image")
    said = messages[at].get("content") or ""
    parts = (_text(said),) if isinstance(said, str) else said
    messages[at] = {**messages[at], "content": (*({"type": "image", "image": p} for p in left), *parts)}
    return tuple(messages)
