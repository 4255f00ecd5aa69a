"""The pictures of an example: opened and counted when its row is tokenised, and prepared when a batch needs them."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from input_pipeline.chat import Rendered, Trained
from input_pipeline.content import pictures_of
from input_pipeline.encode import Tokens
from input_pipeline.examples import Example, RowError
from input_pipeline.images import Opener
from input_pipeline.processors.processor import Prepared, Processor


class Placeholders(NamedTuple):
    """What the placeholders of a row's pictures become, one after the other, and how many tokens those have that only
    pictures have."""

    placeholder: str
    texts: tuple[str, ...]
    tokens: int

    def expand(self, text: str) -> str:
        """A text with its placeholders, which are the first of the row's, expanded; RowError for another number."""
        pieces = text.split(self.placeholder)
        if len(pieces) > len(self.texts) + 1:
            raise RowError(f"the text holds {self.placeholder!r}, with which pictures are marked", "image")
        return "".join(p + t for p, t in zip(pieces, (*self.texts[: len(pieces) - 1], ""), strict=True))

    def check(self, text: str) -> None:
        """RowError where a text does not show all the pictures."""
        if (count := text.count(self.placeholder)) != len(self.texts):
            raise RowError(
                f"has {len(self.texts)} pictures, and the chat template writes {self.placeholder!r} {count} times;"
                " set model.chat_template to one that shows pictures",
                "template",
            )

    def rendered(self, rendered: Rendered) -> Rendered:
        """A rendered text with its placeholders expanded, and all places in it moved along."""
        self.check(rendered.text)
        starts, at = [], rendered.text.find(self.placeholder)
        while at >= 0:
            starts.append(at + len(self.placeholder))
            at = rendered.text.find(self.placeholder, starts[-1])
        grown = np.cumsum([0, *(len(text) - len(self.placeholder) for text in self.texts)])

        def moved(place: int) -> int:
            return place + int(grown[np.searchsorted(starts, place, side="right")])

        spans = rendered.trained
        if spans is not None:
            given = (None if s.given is None else self.expand(s.given) for s in spans)
            spans = tuple(Trained(moved(s.start), moved(s.end), g) for s, g in zip(spans, given, strict=True))
        prompt = None if rendered.prompt is None else self.expand(rendered.prompt)
        return rendered._replace(text=self.expand(rendered.text), trained=spans, prompt=prompt)


@dataclass(frozen=True)
class Pictures:
    """How the pictures of some datasets are opened and prepared; picklable."""

    processor: Processor
    openers: tuple[Opener, ...] = field(default=())  # of each dataset

    def placeholders(self, example: Example, dataset: int) -> Placeholders | None:
        """What stands for the pictures of an example in its text; all of them are opened. None if it has none."""
        pictures = pictures_of(example)
        if not pictures:
            return None
        images = self.openers[dataset].open(pictures)
        texts = self.processor.expand([image.size for image in images])
        tokens = sum(text.count(own) for text in texts for own in self.processor.own)
        return Placeholders(self.processor.placeholder, tuple(texts), tokens)

    def settled(self, tokens: Tokens, placeholders: Placeholders | None, *, times: int = 1) -> Tokens | RowError:
        """The tokens of a row with nothing of its pictures trained; RowError where they are cut. They stand there so
        many `times`."""
        own = np.isin(tokens.ids, list(self.processor.own.values()))
        expected = 0 if placeholders is None else placeholders.tokens * times
        if (count := int(own.sum())) < expected:
            return RowError(
                f"its pictures are {expected // times} tokens, and {count // times} fit: a picture is never cut;"
                " allow longer rows or prompts, or make pictures smaller by model.processor_kwargs",
                "length",
            )
        if count > expected:
            return RowError(f"the text holds tokens that stand for pictures ({', '.join(self.processor.own)})", "image")
        spelled = 0 if placeholders is None else sum(len(text.encode()) for text in placeholders.texts) * times
        trained = np.where(own, np.zeros((), tokens.trained.dtype), tokens.trained)
        return tokens._replace(trained=trained, text_bytes=max(0, tokens.text_bytes - spelled))

    def prepare(self, example: Example, dataset: int) -> Prepared:
        """The pictures of an example as the model takes them."""
        images = self.openers[dataset].open(pictures_of(example))
        return self.processor.prepare(images) if images else self.processor.nothing()

    def fingerprint(self) -> tuple[Any, ...]:
        """All that decides what becomes of pictures."""
        return self.processor.facts, self.openers
