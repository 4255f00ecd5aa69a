"""Which text belongs to which message: the templates that TRL ships are the corpus, its hand-marked variants the
oracle."""

from pathlib import Path

import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

from input_pipeline.turns import Span, find_turns, has_generation_blocks

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

CHAT = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello you"},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "Sure thing."},
]
# But for those that want content as a list of items, images among them.
NAMES = sorted(p.stem for p in TEMPLATES.glob("*.jinja") if not p.stem.startswith(("idefics3", "llava", "smolvlm")))


def turns(template: str, messages=CHAT):
    return find_turns(template, messages, tools=None, documents=None, add_generation_prompt=False, **TOKENS)


def test_each_turn_is_what_the_loop_rendered_for_its_message():
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{{ eos_token }}"
    found = turns(template)
    text = "<s>[user] Hi there\n[assistant] Hello you\n[user] More?\n[assistant] Sure thing.\n</s>"
    assert found == (text, {0: Span(3, 19), 1: Span(19, 41), 2: Span(41, 54), 3: Span(54, 78)}, ())


def test_loops_that_render_nothing_and_loops_inside_a_turn_do_not_disturb():
    template = (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% set ns.last = loop.index0 %}{% endfor %}"
        "{% for m in messages[1:] %}"
        "{% for c in m.content %}{{ c }}{% if c == 'l' %}{% continue %}{% endif %}.{% endfor %}"
        "{% if loop.first %}{% for other in messages %}{% endfor %}{% endif %}|{% endfor %}"
    )
    found = turns(template, [*CHAT[:1], {"role": "x", "content": "lo"}, {"role": "y", "content": "a"}])
    assert found.text == "lo.|a.|"
    assert found.turns == {1: Span(0, 4), 2: Span(4, 7)}


def test_a_message_rendered_twice_has_no_turn_of_its_own():
    loop = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert turns(loop + loop, CHAT[:1]) == ("Hi thereHi there", {}, ())


def test_generation_blocks_are_reported_with_their_places_even_inside_macros():
    template = (
        "{% macro say(m) %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{% endfor %}"
    )
    assert has_generation_blocks(template)
    assert not has_generation_blocks("{# {% generation %} is for others #}{% if generation %}{% endif %}")
    assert turns(template, CHAT[:2]).generated == (Span(1, 9), Span(11, 20))


@pytest.mark.parametrize("name", NAMES)
def test_marks_do_not_change_what_a_real_template_renders(name):
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    rendered, _ = render_jinja_template([CHAT], chat_template=template, **TOKENS)
    found = turns(template)
    assert found.text == rendered[0]
    for message in (1, 3):
        span = found.turns[message]
        assert CHAT[message]["content"] in found.text[span.start : span.end]
        assert CHAT[message - 1]["content"] not in found.text[span.start : span.end]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_training")])
def test_generation_blocks_are_where_transformers_sees_them(name):
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    rendered, blocks = render_jinja_template(
        [CHAT], chat_template=template, return_assistant_tokens_mask=True, **TOKENS
    )
    found = turns(template)
    assert found.text == rendered[0]
    assert sorted(found.generated) == sorted(Span(*block) for block in blocks[0])
