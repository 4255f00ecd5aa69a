"""What the rows of a dataset mean: which format, with which columns and function before it, which tokens are trained.

`dataset_kwargs` says it, the table of known datasets (`known.py`) says it, or the first row does.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from input_pipeline import formats
from input_pipeline.content import with_column
from input_pipeline.examples import Example, RowError
from input_pipeline.known import Known, known
from input_pipeline.reshape import Reshape, reshape

Record = tuple[Any, Callable[[], str]]  # a row, or the error of reading it; what names its place

_LOOKED_AT = 1_000  # rows that are looked at for a format before a dataset is given up
_COLUMNS = {  # key → the field whose column it names, by format; it means the first of these that is trained
    "messages_column": {"conversation": "messages", "sharegpt": "conversations", "preference": "messages"},
    "prompt_column": {
        "alpaca": "instruction",
        "prompt_completion": "prompt",
        "preference": "prompt",
        "kto": "prompt",
        "prompt": "prompt",
        "verl": "prompt",
    },
    "input_column": {"alpaca": "input"},
    "response_column": {"alpaca": "output", "prompt_completion": "completion", "kto": "completion"},
    "question_column": {"alpaca": "instruction"},
    "answer_column": {"alpaca": "output"},
    "chosen_column": {"preference": "chosen"},
    "rejected_column": {"preference": "rejected"},
    "label_column": {"kto": "label"},
}
_IMAGE_COLUMN = ("image_column", "images_column")
_TEXT_FIELD = ("text_col", "text_column", "dataset_text_field")
_ROW_LENGTH = "rows are as long as model.model_max_length says"
_NO_EFFECT = {
    "task": "",
    "return_tensors": "",
    "return_conversations": "",
    "return_conversations_format": "",
    "seq_length": _ROW_LENGTH,
    "skip_last": "the last tokens of a corpus are kept",
    "append_concat_token": "every document ends with the end-of-sequence token",
    "add_special_tokens": "every document has the special tokens that the tokenizer adds",
}
_LEAVES_OUT_ANSWERS = "exclude_final_assistant_message"
KEYS = (
    "format",
    "transform",
    *_COLUMNS,
    *_TEXT_FIELD,
    "assistant_only",
    "response_template",
    "instruction_template",
    "include_system_prompt",
    "image_root",
    "processor_name",
    *_IMAGE_COLUMN,
    _LEAVES_OUT_ANSWERS,
    *_NO_EFFECT,
)


@dataclass(frozen=True)
class Meaning:
    """How the rows of a dataset are understood."""

    format: str
    format_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reshape: Reshape = field(default_factory=Reshape)
    assistant_only: bool = False
    required: tuple[str, ...] = ()  # strings that must occur in the rendered chat
    notices: tuple[str, ...] = ()

    def example(self, row: Any, where: Callable[[], str]) -> Example | None:
        """A row understood, or None where the transform leaves it out; RowError begins with what `where` answers."""
        try:
            shaped = self.reshape(row)
            if shaped is None:
                return None
            return with_column(formats.load(self.format).parse(shaped, **self.format_kwargs), shaped)
        except RowError as error:
            raise error.at(where()) from error.__cause__


def meaning_of(
    kwargs: Mapping[str, Any],
    records: Iterable[Record],
    *,
    name: str | None,
    split: str = "train",
    skip_bad_rows: bool = False,
    text_field: str = "text",
    trainer: str = "TRL_SFT",
) -> Meaning:
    """The meaning of the rows of the dataset `name`, whose `dataset_kwargs` are given.

    Where these and the table of known datasets say no format, the first of the `records` does (the first good one with
    `skip_bad_rows`). `text_field` is the column of plain text; `trainer` says which formats can be trained. ValueError
    where keys do not go together, or where the trainer does not train such rows.
    """
    if kwargs.get(_LEAVES_OUT_ANSWERS):
        raise NotImplementedError(f"not implemented yet: dataset_kwargs.{_LEAVES_OUT_ANSWERS}; it is for inference")
    listed = known(name)
    shape = _transform(kwargs, listed, split)
    text_field = _text_field(kwargs, listed, text_field)
    kind = _said(kwargs, listed, trainer)
    if kind is None:
        kind = _detected(records, shape, skip_bad_rows=skip_bad_rows, text_field=text_field, trainer=trainer)
    else:
        formats.check_trained(kind, trainer)
    same = listed if listed.format == kind else Known()
    options = dict(same.options)
    if kind == "text":
        options["field"] = text_field
    if kind == "alpaca" and "include_system_prompt" in kwargs:
        options["system_prompt"] = bool(kwargs["include_system_prompt"])
    columns = _columns(kwargs, kind, {} if kind == "text" else same.columns)
    if (column := next((kwargs[key] for key in _IMAGE_COLUMN if kwargs.get(key)), None)) is not None:
        columns["images"] = str(column)
    return Meaning(
        format=kind,
        format_kwargs=options,
        reshape=replace(shape, columns=columns),
        assistant_only=bool(kwargs.get("assistant_only", False)),
        required=tuple(t for key in ("response_template", "instruction_template") if (t := kwargs.get(key))),
        notices=tuple(_without_effect(key) for key in kwargs if key in _NO_EFFECT),
    )


def check_keys(kwargs: Mapping[str, Any], *, others: tuple[str, ...] = ()) -> None:
    """ValueError for a key of dataset_kwargs that means nothing; `others` are those that say where rows are."""
    allowed = (*KEYS, *others)
    for key in kwargs:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"dataset_kwargs.{key} is unknown{hint} Known here: {', '.join(allowed)}")


def check_spelling(kwargs: Mapping[str, Any]) -> None:
    """ValueError for a key that is nearly one of ours; others are for whoever loads the dataset."""
    for key in kwargs:
        if key not in KEYS and (near := difflib.get_close_matches(key, KEYS, n=1, cutoff=0.85)):
            raise ValueError(f"dataset_kwargs.{key} is unknown; did you mean {near[0]!r}?")


def _said(kwargs: Mapping[str, Any], listed: Known, trainer: str) -> str | None:
    """The format that is named, in words or by the columns it has."""
    if kwargs.get("format"):
        return formats.canonical(kwargs["format"])
    if listed.format:
        return listed.format
    for key in _COLUMNS:
        if key in kwargs:
            return next((kind for kind in _COLUMNS[key] if kind in formats.TRAINED[trainer]), next(iter(_COLUMNS[key])))
    return None


def _columns(kwargs: Mapping[str, Any], kind: str, listed: Mapping[str, str | None]) -> dict[str, str | None]:
    """Field → column, from the known ones and those that are given."""
    given: dict[str, str | None] = {}
    for key in _COLUMNS:
        if key in kwargs:
            if kind not in _COLUMNS[key]:
                here = ", ".join(key for key, fields in _COLUMNS.items() if kind in fields) or "none"
                raise ValueError(f"dataset_kwargs.{key} says nothing about rows of format {kind}; there: {here}")
            given[_COLUMNS[key][kind]] = str(kwargs[key])
    # With a question's and an answer's column named, one that happens to be called "input" is no part of the question.
    unused: dict[str, str | None] = {"input": None} if kind == "alpaca" and given else {}
    return {**unused, **listed, **given}


def _text_field(kwargs: Mapping[str, Any], listed: Known, text_field: str) -> str:
    given = next((kwargs[key] for key in _TEXT_FIELD if kwargs.get(key)), None)
    if given is not None or text_field != "text":
        return str(given or text_field)
    return listed.columns.get("text") or text_field


def _transform(kwargs: Mapping[str, Any], listed: Known, split: str) -> Reshape:
    if kwargs.get("transform"):
        return reshape(str(kwargs["transform"]))
    if listed.transform is None:
        return Reshape()
    arguments = {"split": split.partition("[")[0]} if listed.tells_split else {}
    return reshape(f"input_pipeline.known:{listed.transform}", arguments=arguments)


def _without_effect(key: str) -> str:
    return f"dataset_kwargs.{key} has no effect here" + (f": {why}" if (why := _NO_EFFECT[key]) else "")


def _detected(records: Iterable[Record], shape: Reshape, *, skip_bad_rows: bool, text_field: str, trainer: str) -> str:
    """The format of the first row that is not left out."""
    first: RowError | None = None
    for number, (row, where) in enumerate(records):
        if number == _LOOKED_AT and first is not None:
            break
        try:
            if isinstance(row, RowError):
                raise row
            try:
                shaped = shape(row)
                if shaped is not None:
                    return formats.detect(shaped, text_field, trainer=trainer)
            except RowError as error:
                raise error.at(where()) from error.__cause__
        except RowError as error:
            if not skip_bad_rows:
                raise
            first = first or error
    if first is not None:
        raise first
    return formats.TRAINED[trainer][0]  # no rows at all: that is reported where rows are counted
