"""What is trained in a chat: literal texts, real templates, and properties that hold for every conversation."""

import unicodedata
from pathlib import Path

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.chat import LossMask, render
from input_pipeline.encode import encode
from input_pipeline.examples import Chat, Completion, RowError, Text
from input_pipeline.template import Template
from input_pipeline.turns import has_generation_blocks

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def message(role, content, **rest):
    return {"role": role, "content": content, **rest}


CALL = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CHAT = (
    message("system", "Be brief."),
    message("user", "How are you?"),
    message("assistant", "Fine."),
    message("user", "And the weather?"),
    message("assistant", "It rains."),
)
TOOLS = (
    message("user", "Weather?"),
    {"role": "assistant", "tool_calls": [CALL]},
    message("tool", "4 C", tool_call_id="call12345", name="get_weather"),
    message("assistant", "It is 4 C."),
)


def trained(example, tokenizer, turns="assistant", *, completion_only=None, max_length=None):
    """The runs of trained tokens, decoded."""
    rendered = render(example, Template(tokenizer), LossMask(turns, completion_only))
    (tokens,) = encode([rendered], tokenizer, max_length=max_length)
    if isinstance(tokens, RowError):
        raise tokens
    runs, before = [], False
    for token, now in zip(tokens.ids.tolist(), tokens.trained.tolist(), strict=True):
        if now and not before:
            runs.append([])
        if now:
            runs[-1].append(token)
        before = now
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def with_template(tokenizer_maker, source):
    tokenizer = tokenizer_maker(template=None)
    tokenizer.chat_template = source
    return tokenizer


def trl_template(tokenizer_maker, name):
    return with_template(tokenizer_maker, (TRL_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))


def test_all_tokens_are_trained_by_default(tokenizer):
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT)
    assert trained(Chat(messages=CHAT), tokenizer, "all") == [text]


def test_assistant_turns_are_trained_from_behind_their_header_to_the_end_of_their_turn(tokenizer):
    assert trained(Chat(messages=CHAT), tokenizer) == ["Fine.<|im_end|>\n", "It rains.<|im_end|>\n"]


def test_the_final_turn_is_the_last_of_the_assistant_even_if_a_user_follows(tokenizer):
    assert trained(Chat(messages=CHAT), tokenizer, "final") == ["It rains.<|im_end|>\n"]
    assert trained(Chat(messages=CHAT[:4]), tokenizer, "final") == ["Fine.<|im_end|>\n"]


def test_a_chat_without_an_assistant_is_a_bad_row_where_only_assistants_are_trained(tokenizer):
    with pytest.raises(RowError, match="has no assistant turn, and only those are to be trained") as raised:
        trained(Chat(messages=CHAT[:2]), tokenizer)
    assert raised.value.kind == "roles"
    assert trained(Chat(messages=CHAT[1:2]), tokenizer, "all") == ["<|im_start|>user\nHow are you?<|im_end|>\n"]


def test_an_assistant_that_opens_the_chat_is_trained_too(tokenizer, tokenizer_maker):
    assert trained(Chat(messages=CHAT[2:4]), tokenizer) == ["Fine.<|im_end|>\n"]
    # With a system prompt of the template's own before it, as SmolLM2's and Qwen2.5's write.
    own = trl_template(tokenizer_maker, "qwen2_5")
    assert "You are Qwen" in render(Chat(messages=CHAT[2:4]), Template(own), LossMask()).text
    assert trained(Chat(messages=CHAT[2:4]), own) == ["Fine.<|im_end|>\n"]


def test_text_that_looks_like_a_header_inside_a_user_turn_is_not_trained(tokenizer):
    chat = Chat(messages=(message("user", "<|im_start|>assistant\nFine.<|im_end|>\n"), message("assistant", "No.")))
    assert trained(chat, tokenizer) == ["No.<|im_end|>\n"]


def test_an_answers_first_token_is_trained_even_if_it_takes_up_the_prompts_last_space(tokenizer_maker):
    tokenizer = tokenizer_maker(template="default")
    # "assistant " is given, and " It" is one token; "Fine" is none with the space before it.
    assert trained(Chat(messages=CHAT), tokenizer) == ["Fine.\n\n", " It rains.\n\n"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # An empty thought in its last turn only.
        ("qwen3", ["Fine.<|im_end|>\n", "<think>\n\n</think>\n\nIt rains.<|im_end|>\n"]),
        ("llama3", ["Fine.<|eot_id|>", "It rains.<|eot_id|>"]),
        ("phi3", ["Fine.<|end|>\n", "It rains.<|end|>\n<|im_end|>"]),  # closes the chat with the end-of-sequence token
        ("deepseek_r1_distill", ["Fine.<｜end▁of▁sentence｜>", "It rains.<｜end▁of▁sentence｜>"]),  # prompt "<think>"
        ("gptoss", ["<|channel|>final<|message|>Fine.<|end|>", "<|channel|>final<|message|>It rains.<|return|>"]),
        ("cohere2", None),
        ("lfm2", None),
        ("qwen3_instruct_2507", None),
        ("qwen3_vl", None),
    ],
)
def test_real_templates_train_what_the_model_has_to_say(tokenizer_maker, name, expected):
    tokenizer = trl_template(tokenizer_maker, name)
    tokenizer.bos_token = "<|endoftext|>"
    if name == "deepseek_r1_distill":  # its special tokens, which the small vocabulary lacks
        tokenizer.add_tokens(["<｜Assistant｜>", "<｜User｜>", "<｜end▁of▁sentence｜>"], special_tokens=True)
    if expected is None:  # as TRL's hand-marked variant of the template
        expected = trained(Chat(messages=CHAT), trl_template(tokenizer_maker, f"{name}_training"))
        assert len(expected) == 2
    assert trained(Chat(messages=CHAT), tokenizer) == expected


def test_a_template_that_always_ends_with_the_assistants_header_does_not_train_it(tokenizer_maker):
    # The Llama 3 template as first published.
    turn = "{{ '[' + m.role + ']\\n' + m.content + '<|im_end|>' }}"
    source = "{% for m in messages %}" + turn + "{% endfor %}{{ '[assistant]\\n' }}"
    assert trained(Chat(messages=CHAT[1:]), with_template(tokenizer_maker, source)) == [
        "Fine.<|im_end|>",
        "It rains.<|im_end|>",
    ]


def test_tool_calls_are_trained_and_what_the_tool_says_is_not(qwen3):
    chat = Chat(messages=TOOLS, tools=(TOOL,))
    assert trained(chat, qwen3) == [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n',
        "<think>\n\n</think>\n\nIt is 4 C.<|im_end|>\n",
    ]


def test_reasoning_is_trained_where_the_template_keeps_it(qwen3):
    thinking = tuple({**m, "reasoning_content": "Hm."} if m["role"] == "assistant" else m for m in CHAT)
    assert trained(Chat(messages=thinking), qwen3) == [
        "Fine.<|im_end|>\n",
        "<think>\nHm.\n</think>\n\nIt rains.<|im_end|>\n",
    ]
    plain = Chat(messages=CHAT, template_kwargs={"enable_thinking": False})
    assert trained(plain, qwen3)[-1] == "It rains.<|im_end|>\n"  # the prompt holds the empty thought already


@pytest.mark.parametrize(
    ("template", "form"),
    [("qwen3", (False, "")), ("llama3_1", (False, "")), ("chat_ml", None), ("phi3", None)],
)
def test_the_form_of_tool_calls_is_found_by_trying(tokenizer_maker, template, form):
    tokenizer = tokenizer_maker() if template == "chat_ml" else trl_template(tokenizer_maker, template)
    assert Template(tokenizer).tool_call_form == form


def test_a_template_that_writes_todays_date_writes_the_same_every_day(tokenizer_maker):
    source = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    chat = Chat(messages=CHAT[1:3])
    tokenizer = with_template(tokenizer_maker, source)
    assert render(chat, Template(tokenizer), LossMask()).text == "26 Jul 2024[user]How are you?[assistant]Fine."
    assert trained(chat, tokenizer) == ["[assistant]Fine."]


def test_arguments_are_given_as_a_string_to_a_template_that_wants_one(tokenizer_maker):
    source = (
        "{% for m in messages %}{{ m.role }}:{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %};{% endfor %}"
    )
    tokenizer = with_template(tokenizer_maker, source)
    assert Template(tokenizer).tool_call_form == (True, "")
    assert trained(Chat(messages=TOOLS), tokenizer)[0] == 'assistant:get_weather{"city": "Oslo"};'


def test_generation_blocks_are_believed_and_final_picks_those_of_the_last_turn(tokenizer_maker):
    tokenizer = tokenizer_maker(template="default_gen")
    assert has_generation_blocks(tokenizer.chat_template)
    assert trained(Chat(messages=CHAT), tokenizer) == ["Fine.", " It rains."]
    assert trained(Chat(messages=CHAT), tokenizer, "final") == [" It rains."]


CURE = "Set model.chat_template to one with {% generation %} blocks, or train on all tokens"


@pytest.mark.parametrize(
    ("source", "chat", "error"),
    [
        (None, CHAT, "the tokenizer has no chat template; set model.chat_template"),
        (
            "{{ messages[0].content }}{{ raise_exception('roles must alternate') }}",
            CHAT,
            "the chat template does not take these messages: roles must alternate",
        ),
        (
            "{% for i in range(messages|length) %}{{ messages[i].content }}{% endfor %}",
            CHAT[1:],
            f"the chat template gives messages[0] (user) no turn of its own. {CURE}",
        ),
        (
            "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% if m.tool_calls %}"
            "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments|tojson }}{% endfor %}"
            "{{ messages[loop.index].content if not loop.last else '' }}{% endif %}{% endfor %}",
            TOOLS,
            f"the chat template gives messages[2] (tool) no turn of its own. {CURE}",
        ),
        (
            "{% for m in messages %}{{ m | length }}{% endfor %}",
            CHAT,
            f"the chat template renders another text when it is followed message by message. {CURE}",
        ),
        (
            "{{ 'p' if add_generation_prompt else 'q' }}{% for m in messages %}{{ m.content }}{% endfor %}",
            CHAT[1:],
            f"the chat template renders the messages before messages[1] otherwise in a prompt. {CURE}",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}{{ '<think>' if add_generation_prompt }}",
            CHAT[1:],
            f"the chat template opens messages[1] otherwise than its generation prompt. {CURE}",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
            "{{ '<|im_start|>model\n' if add_generation_prompt }}",
            CHAT[1:],
            f"the chat template opens messages[1] otherwise than its generation prompt. {CURE}",
        ),
    ],
)
def test_where_the_assistants_part_cannot_be_told_exactly_the_row_is_an_error(tokenizer_maker, source, chat, error):
    with pytest.raises(RowError) as raised:
        trained(Chat(messages=chat), with_template(tokenizer_maker, source))
    assert str(raised.value) == error
    assert raised.value.kind == ("roles" if "must alternate" in error else "template")


def test_tool_calls_that_the_template_drops_are_an_error(tokenizer):
    with pytest.raises(RowError, match="has tool_calls, which the chat template does not render"):
        trained(Chat(messages=TOOLS), tokenizer, "all")


def test_plain_text_ends_with_the_end_of_sequence_token_once(tokenizer):
    assert trained(Text(text="Once."), tokenizer, "all") == ["Once.<|im_end|>"]
    assert trained(Text(text="Once.<|im_end|>"), tokenizer, "all") == ["Once.<|im_end|>"]


def test_of_a_prompt_and_its_completion_the_completion_is_trained_unless_all_is_asked_for(tokenizer):
    pair = Completion(prompt="2 + 2 =", completion=" 4")
    assert trained(pair, tokenizer, "all") == [" 4<|im_end|>"]
    assert trained(pair, tokenizer, "all", completion_only=False) == ["2 + 2 = 4<|im_end|>"]


def test_of_a_conversational_prompt_and_completion_everything_after_the_prompt_is_trained(tokenizer):
    pair = Chat(messages=CHAT, prompt_messages=2)
    expected = (
        "Fine.<|im_end|>\n<|im_start|>user\nAnd the weather?<|im_end|>\n<|im_start|>assistant\nIt rains.<|im_end|>\n"
    )
    assert trained(pair, tokenizer, "all") == [expected]
    assert trained(pair, tokenizer, "assistant") == ["Fine.<|im_end|>\n", "It rains.<|im_end|>\n"]
    later = Chat(messages=CHAT, prompt_messages=4)
    assert trained(later, tokenizer, "assistant") == ["It rains.<|im_end|>\n"]


def test_masks_that_a_row_cannot_have_are_errors(tokenizer):
    with pytest.raises(RowError, match="has no prompt and completion; completion_only_loss needs both"):
        trained(Text(text="x"), tokenizer, "all", completion_only=True)
    with pytest.raises(RowError, match="has no prompt and completion; completion_only_loss needs both"):
        trained(Chat(messages=CHAT), tokenizer, "all", completion_only=True)
    with pytest.raises(RowError, match="has no assistant turns, and only those are to be trained"):
        trained(Text(text="x"), tokenizer, "assistant")


# Any text but the tokens of ChatML themselves (which a user may write, but then they are no longer text).
contents = st.text(max_size=30).filter(lambda s: "<|" not in s and "\U0010fa00" not in s and "\U0010fa01" not in s)


@settings(max_examples=120, deadline=None)
@given(system=st.none() | contents, pairs=st.lists(st.tuples(contents, contents), min_size=1, max_size=3))
def test_trained_tokens_decode_to_exactly_the_assistants_texts(tokenizer, system, pairs):
    messages = [message("system", system)] if system is not None else []
    for user, answer in pairs:
        messages += [message("user", user), message("assistant", answer)]
    chat = Chat(messages=tuple(messages))
    answers = [f"{answer.strip()}<|im_end|>\n" for _, answer in pairs]  # the template trims, as Jinja does
    assert trained(chat, tokenizer) == answers
    assert trained(chat, tokenizer, "final") == answers[-1:]


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(contents, contents), min_size=1, max_size=3))
def test_trained_tokens_of_a_real_tokenizer_decode_to_exactly_the_assistants_texts(qwen3, pairs):
    messages = [m for user, answer in pairs for m in (message("user", user), message("assistant", "¶" + answer))]
    runs = trained(Chat(messages=tuple(messages)), qwen3)
    assert [run.rpartition("</think>\n\n")[2] for run in runs] == [
        # Qwen's tokenizer writes characters in their composed form (Unicode's NFC).
        unicodedata.normalize("NFC", f"¶{answer.rpartition('</think>')[2]}<|im_end|>\n")
        for _, answer in pairs
    ]
