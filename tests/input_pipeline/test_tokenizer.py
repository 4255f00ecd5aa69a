"""Tokenizers from a folder: padding token, chat template by name, and what the templates that come with einkorn
render."""

import json
import subprocess
import sys

import pytest

from input_pipeline.tokenizer import load_tokenizer, read_template, template_names

CHAT = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": " Hi"},
    {"role": "assistant", "content": "Hello"},
]
RENDERED = {
    "chat_ml": "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n",
    "default": "<s>system Be brief.\n\nuser Hi\n\nassistant Hello\n\n",
    "default_gen": "SYSTEM: Be brief.\nUSER: Hi\nASSISTANT: Hello",
    "gemma2-it": "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n",
    "gpt2": "Be brief. </s> Hi</s>Hello</s>",
    "llama3-instruct": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>",
    "paligemma": "<s>Be brief. \n Hi\nHello</s>",
    "phi3-instruct": "<|system|>\nBe brief. <|end|>\n<|user|>\n Hi<|end|>\n<|assistant|>\nHello<|end|>\n",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n",
}
PROMPTS = {
    "chat_ml": "<|im_start|>assistant\n",
    "default": "assistant ",
    "default_gen": "\nASSISTANT: ",
    "gemma2-it": "<start_of_turn>model\n",
    "gpt2": "",
    "llama3-instruct": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "paligemma": "",
    "phi3-instruct": "<|assistant|>\n",
    "zephyr": "<|assistant|>\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_maker):
    """A tokenizer without a template and without a padding token, as base models have them."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizer_maker(template=None)
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|endoftext|>"
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", template_names())
def test_each_template_renders_its_documented_format(tokenizer_maker, name):
    tokenizer = tokenizer_maker(template=name)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == RENDERED[name]
    with_prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert with_prompt.endswith(PROMPTS[name])
    without = tokenizer.apply_chat_template(CHAT[:2], tokenize=False)
    assert with_prompt == without + PROMPTS[name]


def test_chatml_does_not_repeat_a_bos_token_that_opens_messages_anyway(tokenizer_maker):
    tokenizer = tokenizer_maker(template="chat_ml")
    tokenizer.bos_token = "<|im_start|>"  # SmolLM2's
    text = tokenizer.apply_chat_template(CHAT[1:2], tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n"


def test_gemma_refuses_roles_out_of_turn(tokenizer_maker):
    with pytest.raises(
        Exception, match="Gemma needs user and assistant messages in turn, the user first; message 2 is by"
    ):
        tokenizer_maker(template="gemma2-it").apply_chat_template([CHAT[1], CHAT[1]], tokenize=False)


def test_the_padding_token_is_the_one_named_or_its_own_or_the_reserved_one_or_the_end_token(folder, tokenizer_maker):
    assert load_tokenizer(str(folder), pad_token="<think>").pad_token == "<think>"
    assert load_tokenizer(str(folder)).pad_token == "<|endoftext|>"
    own = tokenizer_maker()
    own.add_tokens(["<|finetune_right_pad_id|>"], special_tokens=True)
    own.save_pretrained(folder / "own")
    assert load_tokenizer(str(folder / "own")).pad_token == "<|endoftext|>"
    own.pad_token = None
    own.save_pretrained(folder / "llama")
    assert load_tokenizer(str(folder / "llama")).pad_token == "<|finetune_right_pad_id|>"
    with pytest.raises(ValueError, match=r"pad_token '<nope>' is not in the vocabulary of '.*'; name a token that is"):
        load_tokenizer(str(folder), pad_token="<nope>")


def test_the_template_is_its_own_or_of_its_model_type_or_the_one_named(folder, tokenizer_maker, tmp_path):
    assert load_tokenizer(str(folder)).chat_template is None
    assert load_tokenizer(str(folder), chat_template="auto").chat_template == read_template("default")
    assert load_tokenizer(str(folder), chat_template="zephyr").chat_template == read_template("zephyr")
    gpt2 = tmp_path / "gpt2"
    load_tokenizer(str(folder)).save_pretrained(gpt2)
    (gpt2 / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert load_tokenizer(str(gpt2)).chat_template == read_template("gpt2")
    tokenizer_maker(template="zephyr").save_pretrained(tmp_path / "own")
    assert load_tokenizer(str(tmp_path / "own"), chat_template="auto").chat_template == read_template("zephyr")
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    mine = load_tokenizer(str(folder), chat_template=str(tmp_path / "mine.jinja"))
    assert mine.chat_template == "{{ messages[0].content }}"


def test_an_unknown_template_is_answered_with_those_that_exist(folder):
    with pytest.raises(
        ValueError, match=r"chat_template 'chatml' is unknown; known: auto, chat_ml, default, .*zephyr, or"
    ):
        load_tokenizer(str(folder), chat_template="chatml")
    with pytest.raises(ValueError, match=r"chat_template 'no/such\.jinja': there is no such file \(looked in "):
        load_tokenizer(str(folder), chat_template="no/such.jinja")


def test_tokenizers_load_without_torch_and_worker_processes_without_jax(folder, root):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['jax'] = None\n"  # importing either is an error
        "import input_pipeline.store\n"
        "from input_pipeline.tokenizer import load_tokenizer\n"
        f"assert load_tokenizer({str(folder)!r}, chat_template='chat_ml').is_fast"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
