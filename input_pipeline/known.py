"""What datasets that go by a name are like: their format and columns, as one table of data.

A set that is not listed here is read too, if its rows are of a format that is found from their fields. Functions beside
the table turn the rows of a set into rows of a format; they are named in it as the user's own are
(`dataset_kwargs.transform`).
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

Row = Mapping[str, Any]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Known(NamedTuple):
    """How the rows of a named dataset are read; what is left out is found from the first row."""

    format: str | None = None
    columns: Mapping[str, str | None] = (
        _NOTHING  # field of the format → column; None: the row has it, and it is not used
    )
    options: Mapping[str, Any] = _NOTHING  # of the format
    transform: str | None = None  # function of this file
    tells_split: bool = False  # that function is told which split the rows are of
    rows: str | None = None  # function that makes them, `module:function`
    takes: tuple[str, ...] = ()  # what it is called with: names of dataset_kwargs, and the entry's `seed` and `split`
    from_file: bool = False  # dataset_path says where they are
    of_any: bool = False  # it is no dataset, but a way to read any; dataset_kwargs.hf_dataset_path names one


def known(name: str | None) -> Known:
    """What is known of a dataset; nothing where it is not listed."""
    return _BY_LOWER_NAME.get((name or "").lower(), Known())


_ALPACA = Known("alpaca", options={"system_prompt": True, "empty_answers": True})
_CHAT, _SHAREGPT, _TEXT, _CODE = (
    Known("conversation"),
    Known("sharegpt"),
    Known("text"),
    Known("text", {"text": "content"}),
)
_FILE = Known(from_file=True)
_DRAWN = ("size", "seed", "split")
_PUZZLES = ("fewest_numbers", "most_numbers", "highest_number", "lowest_target", "highest_target", "operations")


def _answers(question: str, answer: str, context: str | None = None) -> Known:
    """A user's turn and the assistant's in columns of these names."""
    return Known("alpaca", {"instruction": question, "input": context, "output": answer}, {"empty_answers": True})


def _made_up(name: str) -> Known:
    """Rows that a function of `synthetic.py` makes."""
    return Known(rows=f"input_pipeline.synthetic:{name}", takes=("dataset_size",))


KNOWN = {
    # rows from dataset_path
    "text_sft": _FILE,
    "text_sft_jsonl": _FILE,
    "text": Known("text", from_file=True),
    "preference_pairs_jsonl": Known("preference", from_file=True),
    "vl_sft": _FILE,
    "vl_sft_jsonl": _FILE,
    "vision_language_jsonl": _FILE,
    "vision_dpo_jsonl": Known("preference", from_file=True),
    # any dataset, its columns named in dataset_kwargs
    "HuggingFaceDataset": _CHAT._replace(of_any=True),
    "PromptResponseDataset": _answers("instruction", "output")._replace(of_any=True),
    "hf_vision": _answers("question", "answer")._replace(of_any=True),
    # made up
    "debug_sft": _made_up("debug_sft"),
    "debug_dpo": _made_up("debug_dpo"),
    "debug_kto": _made_up("debug_kto"),
    "debug_pretraining": _made_up("debug_pretraining"),
    "countdown": Known(
        rows="input_pipeline.countdown:countdown",
        takes=(*_DRAWN, *_PUZZLES),
        transform="countdown",
        tells_split=True,
    ),
    "letter_count": Known(
        rows="input_pipeline.letter_count:letter_count",
        takes=(*_DRAWN, "shortest_word", "longest_word"),
        transform="letter_count",
    ),
    # SFT
    "tatsu-lab/alpaca": _ALPACA,
    "yahma/alpaca-cleaned": _ALPACA,
    "uiuc-convai/CoALM-IT": _ALPACA,
    "databricks/databricks-dolly-15k": _answers("instruction", "response", "context"),
    "argilla/databricks-dolly-15k-curated-en": Known("conversation", transform="dolly"),
    "CohereForAI/aya_dataset": _answers("inputs", "targets"),
    "CohereLabs/aya_dataset": _answers("inputs", "targets"),
    "argilla/magpie-ultra-v0.1": _answers("instruction", "response"),
    "Magpie-Align/Llama-3-Magpie-Pro-1M-v0.1": _SHAREGPT,
    "Magpie-Align/Magpie-Pro-300K-Filtered": _SHAREGPT,
    "O1-OPEN/OpenO1-SFT": _answers("instruction", "output"),
    "allenai/tulu-3-sft-mixture": _CHAT,
    "allenai/WildChat-1M": Known("conversation", {"messages": "conversation"}),
    # SFT with pictures
    "HuggingFaceH4/llava-instruct-mix-vsft": _CHAT,
    "merve/vqav2-small": _answers("question", "multiple_choice_answer"),
    "HuggingFaceM4/the_cauldron": Known("conversation", transform="cauldron"),
    # reinforcement learning: read as the trainer that runs needs them
    "trl-lib/tldr": Known(transform="tldr"),
    "openai/gsm8k": Known(transform="gsm8k", tells_split=True),
    "gsm8k": Known(transform="gsm8k", tells_split=True),
    "d1shs0ap/countdown": Known(transform="countdown", tells_split=True),
    "Jiayi-Pan/Countdown-Tasks-3to4": Known(transform="countdown", tells_split=True),
    "oumi-ai/oumi-letter-count": Known(transform="letter_count"),
    "oumi-ai/oumi-letter-count-clean": Known(transform="letter_count"),
    # pretraining
    "allenai/c4": _TEXT,
    "allenai/dolma": _TEXT,
    "tiiuae/falcon-refinedweb": _CODE,
    "HuggingFaceFW/fineweb": _TEXT,
    "HuggingFaceFW/fineweb-edu": _TEXT,
    "EleutherAI/pile": _TEXT,
    "togethercomputer/RedPajama-Data-1T": _TEXT,
    "togethercomputer/RedPajama-Data-V2": Known("text", {"text": "raw_content"}),
    "cerebras/SlimPajama-627B": _TEXT,
    "DKYoon/SlimPajama-6B": _TEXT,
    "bigcode/starcoderdata": _CODE,
    "bigcode/the-stack": _CODE,
    "roneneldan/TinyStories": _TEXT,
    "nampdn-ai/tiny-textbooks": _TEXT,
    "wikimedia/wikipedia": _TEXT,
    "Salesforce/wikitext": Known("text", transform="without_blank_lines"),
    "PleIAs/YouTube-Commons": _TEXT,
}
_BY_LOWER_NAME = {name.lower(): entry for name, entry in KNOWN.items()}

_COUNTDOWN = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant"
    " first thinks about the reasoning process in the mind and then provides the user with the answer.\n"
    "User: Using the numbers {nums}, create an equation that equals {target}. You can use basic arithmetic operations"
    " (+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And return the final"
    " answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.\n"
    "Assistant: Let me solve this step by step.\n<think>"
)
_BOXED = (
    'Your final answer should be an integer written as digits and formatted as "\\boxed{your_answer}".'
    ' For example, if the answer is 42, you should output "\\boxed{42}".'
)
_STEPS = 'Let\'s think step by step and output the final answer after "####".'


def countdown(row: Row, *, split: str) -> Row:
    """`{target, nums}` as a row of verl's, with the prompt of TinyZero; such a row as it is."""
    if "prompt" in row:
        return row
    numbers, target = [int(number) for number in row["nums"]], int(row["target"])
    question = _COUNTDOWN.format(nums=numbers, target=target)
    return {
        "data_source": "countdown",
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": {"numbers": numbers, "target": target}},
        "extra_info": {"split": split},
    }


def cauldron(row: Row) -> Row:
    """`{images, texts: [{user, assistant}, …]}` as a conversation, with the pictures before its first question; such a
    row as it is.
    """
    if "messages" in row:
        return row
    turns = [(role, text[role]) for text in row["texts"] for role in ("user", "assistant")]
    return {"images": row["images"], "messages": [{"role": role, "content": said} for role, said in turns]}


def gsm8k(row: Row, *, split: str) -> Row:
    """`{question, answer}` as a row of verl's, such a row as it is; the truth stands behind "####", without commas."""
    if "prompt" in row:
        return row
    question, answer = row["question"], row["answer"]
    found = re.search(r"#### (-?[0-9.,]+)", answer)
    if found is None:
        raise ValueError('the answer has no "#### " with a number after it')
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"{question} {_STEPS}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": found[1].replace(",", "")},
        "extra_info": {"split": split, "answer": answer, "question": question},
    }


def letter_count(row: Row) -> Row:
    """`{messages, metadata}` as a prompt that asks for a boxed number, with the number beside it; such a row as it
    is.
    """
    if "prompt" in row:
        return row
    return {
        "prompt": [{"role": "system", "content": _BOXED}, row["messages"][0]],
        "letter_count": row["metadata"]["letter_count_integer"],
    }


def tldr(row: Row) -> Row:
    """`{prompt, completion}` without white space around them."""
    return {**row, "prompt": row["prompt"].strip(), "completion": row["completion"].strip()}


def dolly(row: Row) -> Row:
    """The curated columns of Dolly, `new-instruction: {value: […]}` and so on, as a conversation."""
    instruction, context, response = (_first(row[f"new-{name}"]) for name in ("instruction", "context", "response"))
    question = f"{instruction}\n\nContext: {context}" if context else instruction
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": response}]}


def without_blank_lines(row: Row) -> Row | None:
    """A line of text, or None where there is nothing on it."""
    return row if row["text"].strip() else None


def _first(value: Any) -> Any:
    value = value["value"] if isinstance(value, Mapping) else value
    return value[0] if isinstance(value, list) else value
