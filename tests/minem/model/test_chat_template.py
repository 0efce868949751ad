"""Chat templates against transformers: the same text from the same template, and one sentence for one that fails.

python -m pytest tests/minem/model/test_chat_template.py
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from minem.errors import UserError
from minem.model.chat_template import _compile, render

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi <b>&</b> 'é'"}], "bos_token": "<s>"}
GOOD = "{{ bos_token }}{{ messages[0].content }}"
SOURCES = [
    "  {% if true %}\n    a\n  {% endif %}\n{{ messages[0].content }}\n",  # trim_blocks and lstrip_blocks
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% break %}{% endif %}x{% endfor %}",
    "{% generation %}{{ bos_token }}{% endgeneration %}!",
    "{{ messages | tojson }} {{ messages | tojson(indent=2, ensure_ascii=true, sort_keys=true) }}",
    "{% set n = namespace(x=1) %}{% for i in range(3) %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}{{ tools }}",
    "{% macro f(x) %}[{{ x | trim | upper }}]{% endmacro %}{{ f(' a ') }}{{ missing is defined }}",
]


@pytest.mark.parametrize("source", SOURCES)
def test_templates_print_what_transformers_prints(source: str) -> None:
    expected, _ = render_jinja_template([CHAT["messages"]], chat_template=source, bos_token="<s>")
    assert [render(source, {"tools": None, **CHAT})] == expected


FAILING = {
    "syntax": ("{% if %}", "cannot be read: "),
    "a tag that stands open": ("{% for m in messages %}", "cannot be read: "),
    "refusal": ("{{ raise_exception('roles\n must alternate') }}", "fails on this chat: roles must alternate"),
    "undefined": ("{{ messages[0].tool.name }}", "fails on this chat: "),
    "reaching out of the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails on this chat: "),
    "Python's globals": ("{{ cycler.__init__.__globals__ }}", "fails on this chat: "),
    "reading a file": ("{% include '/etc/passwd' %}", "fails on this chat: "),
    "changing its input": ("{{ messages.append(1) }}", "fails on this chat: "),
    "division by zero": ("{{ 1 // 0 }}", "fails on this chat: "),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on this chat: "),
    "a range without an end": ("{% for i in range(10**9) %}{% endfor %}", "fails on this chat: "),
}


@pytest.mark.parametrize("case", FAILING)
def test_templates_that_fail_are_refused_in_one_sentence(case: str) -> None:
    source, expected = FAILING[case]
    with pytest.raises(UserError) as caught:
        render(source, CHAT)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)
    assert CHAT["messages"] == [{"role": "user", "content": "Hi <b>&</b> 'é'"}]


@pytest.mark.parametrize("content", ["\ud800", "\x00\x1b\u202e", "a\nb\r\n", "🙂" * 1000])
def test_contents_stay_unchanged(content: str) -> None:
    assert render(GOOD, {**CHAT, "messages": [{"content": content}]}) == "<s>" + content


def test_a_template_is_compiled_once_and_its_clock_stands_still() -> None:
    source = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    hits = _compile.cache_info().hits
    assert [render(source, {"messages": [{"content": n}]}) for n in range(3)] == [f"26 Jul 2024 {n}" for n in range(3)]
    assert _compile.cache_info().hits == hits + 2
