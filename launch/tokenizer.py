"""`einkorn tokenizer train`: a byte-level BPE from the text of a corpus, as a folder that AutoTokenizer loads.

Texts are read one after the other and never held: what is kept in memory is each different word with its count. The
same texts give the same files, byte for byte.
"""

import functools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from input_pipeline.catalog import Entry, open_stream
from input_pipeline.examples import Chat, Completion, Example, RowError, Text
from input_pipeline.tokenizer import read_template

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
BYTES = 256  # every byte is a token, so that every text can be written
MEASURED = 4_000_000  # bytes that are tokenised to say how long a token is
TOLD_EVERY = 100_000_000  # bytes between two lines of progress


class Options(NamedTuple):
    """What is learned: how many tokens in all, the special ones (the first begins, ends and pads a text), how often a
    pair of tokens must occur to become one, and how many bytes of text are read (None: all).
    """

    vocab_size: int
    special: tuple[str, ...]
    min_frequency: int = 2
    limit: int | None = None
    chat: bool = False
    text_field: str = "text"

    @property
    def all_special(self) -> tuple[str, ...]:
        """The special tokens with those of ChatML."""
        return tuple(dict.fromkeys((*self.special, *(CHAT_TOKENS if self.chat else ()))))


def train(files: Sequence[str], output: Path, options: Options) -> None:
    """Learn a tokenizer from files, write it to the folder `output`, and say how large it is and how long its tokens.

    ValueError where a file or the folder will not do, or where a row cannot be used (it names file and row).
    """
    _check(output, options)
    read = Tally()
    bpe = learn(read.counting(texts(files, text_field=options.text_field), limit=options.limit), options)
    if not read.bytes:
        raise ValueError(f"there is no text in {', '.join(files)}")
    save(bpe, output, options)
    size = bpe.get_vocab_size()
    fewer = "" if size == options.vocab_size else f" ({options.vocab_size:,} asked: no other pair is frequent enough)"
    sample = Tally()
    tokens = sum(
        len(bpe.encode(text, add_special_tokens=False).ids)
        for text in sample.counting(texts(files, text_field=options.text_field), limit=min(read.bytes, MEASURED))
    )
    print(
        f"{output}: {size:,} tokens{fewer} from {read.texts:,} texts of {read.bytes:,} bytes; "
        f"{sample.bytes / tokens:.2f} bytes a token"
    )


def learn(corpus: Iterable[str], options: Options) -> Any:
    """A `tokenizers.Tokenizer` learned from texts: byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2) within
    words, each digit a token of its own.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        min_frequency=options.min_frequency,
        special_tokens=list(options.all_special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    bpe.train_from_iterator(corpus, trainer)
    return bpe


def save(bpe: Any, output: Path, options: Options) -> None:
    """Write a tokenizer as transformers of any version reads it, with its special tokens and, for chats, the template
    of ChatML.
    """
    first = options.special[0]
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": first,
        "eos_token": first,
        "pad_token": first,
        "clean_up_tokenization_spaces": False,
        **({"chat_template": read_template("chat_ml")} if options.chat else {}),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    bpe.save(str(output / "tokenizer.json"))


def texts(files: Iterable[str], *, text_field: str) -> Iterator[str]:
    """The text of every row of the files, in order: of plain rows the field `text_field`, of others what is said in
    them. RowError names the first row that cannot be used.
    """
    for file in files:
        stream = open_stream(Entry(dataset_name="text_sft", dataset_path=file), text_field=text_field)
        for shard in stream.shards:
            for record in shard.read():
                if isinstance(record.row, RowError):
                    raise record.row
                yield from _said(stream.meaning.example(record.row, functools.partial(shard.where, record.number)))


class Tally:
    """Texts and UTF-8 bytes that went through `counting`."""

    def __init__(self) -> None:
        self.texts = self.bytes = 0

    def counting(self, corpus: Iterable[str], *, limit: int | None) -> Iterator[str]:
        """The same texts, up to the one that reaches `limit` bytes; large corpora report how far they are."""
        told = 0
        for text in corpus:
            self.texts += 1
            self.bytes += len(text.encode("utf-8", errors="replace"))
            yield text
            if self.bytes - told >= TOLD_EVERY:
                told = self.bytes
                print(f"read {self.bytes / 1e6:,.0f} MB, {self.texts:,} texts", file=sys.stderr, flush=True)
            if limit is not None and self.bytes >= limit:
                return


def _said(example: Example | None) -> Iterator[str]:
    match example:
        case Text(text=text):
            yield text
        case Completion(prompt=prompt, completion=completion):
            yield from (prompt, completion)
        case Chat(messages=messages):
            yield from (message["content"] for message in messages if isinstance(message.get("content"), str))
        case None:  # left out
            return
        case _:
            raise ValueError(f"a tokenizer learns from text and conversations, not from {type(example).__name__} rows")


def _check(output: Path, options: Options) -> None:
    if (output / "tokenizer.json").exists():
        raise ValueError(f"--output: {output} holds a tokenizer already; remove it, or name another folder")
    if not options.special:
        raise ValueError("--special: name at least one token, which begins, ends and pads a text")
    if options.vocab_size < (least := BYTES + len(options.all_special)):
        raise ValueError(
            f"--vocab-size is {options.vocab_size}; allowed: at least {least}, one for each byte and special token"
        )
