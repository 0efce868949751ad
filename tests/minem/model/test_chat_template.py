"""Chat templates from strangers: what they may not do, and that being refused harms neither the run nor the next chat.

python -m pytest tests/minem/model/test_chat_template.py
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from minem.errors import UserError
from minem.model import chat_template as template
from minem.model.chat_template import render

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "bos_token": "<s>"}
GOOD = "{{ bos_token }}{{ messages[0].content }}"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
ENDLESS = {
    "loops in loops": LOOP + 3 * "{% endfor %}",
    "a loop that prints now and then": "{% for i in range(99999) %}x" + LOOP + 4 * "{% endfor %}",
    "a power": "{{ 3**(7**(2**20)) }}",
    "calls that branch": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a filter": "{{ lipsum(n=10**7) }}",
    "a long list": "{{ (range(99999)|list * 999)|sort|join }}",
}
LARGE = {
    "a text": "{{ 'a' * 10**10 }}",
    "a list": "{{ [0] * 10**9 }}",
    "a width": "{{ 'a'.ljust(10**10) }}",
    "a filter's width": "{{ 'a'|center(10**10) }}",
    "a format": "{{ '%0999999999d' % 1 }}",
    "another format": "{{ '{:999999999}'.format(1) }}",
    "a text doubled": "{% set n = namespace(x='ab') %}" + "{% set n.x = n.x ~ n.x %}" * 40,
    "replacements": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "an indent": "{{ 'a\nb'|indent(10**10) }}",
}


@pytest.mark.parametrize("case", ENDLESS)
def test_a_template_without_an_end_is_stopped(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.2)
    with pytest.raises(UserError, match=r"^takes more than 0\.2 seconds of processor time|^needs more than 512 MiB"):
        render(ENDLESS[case], CHAT)


@pytest.mark.parametrize("case", LARGE)
def test_a_template_that_fills_the_memory_is_stopped(case: str) -> None:
    with pytest.raises(UserError, match=r"^needs more than 512 MiB of memory$"):
        render(LARGE[case], CHAT)


def test_after_a_chat_that_was_stopped_the_next_one_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{% if messages[0].content == 'loop' %}" + LOOP + 3 * "{% endfor %}" + "{% endif %}" + GOOD
    monkeypatch.setattr(template, "SECONDS", 0.2)
    for _ in range(2):
        with pytest.raises(UserError, match="takes more than"):
            render(source, {**CHAT, "messages": [{"content": "loop"}]})
        assert render(source, CHAT) == "<s>Hi"


def test_many_chats_share_one_process_and_one_limit_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of time is one of each chat, not of all together."""
    monkeypatch.setattr(template, "SECONDS", 0.3)
    source = "{% for i in range(60000) %}{% endfor %}" + GOOD
    render(source, CHAT)
    child = template._process(source).child
    assert child is not None
    ticks = os.sysconf("SC_CLK_TCK")
    while sum(map(int, Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])) < 0.6 * ticks:
        assert render(source, CHAT) == "<s>Hi"
    assert template._process(source).child is child


def test_an_answer_that_nobody_waited_for_is_not_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a notebook, while a chat is rendered."""
    source = GOOD + "; "
    render(source, CHAT)
    process = template._process(source)
    child = process.child
    assert child is not None

    class Interrupted:
        def readline(self, limit: int) -> bytes:
            raise KeyboardInterrupt

        def close(self) -> None:
            pass

    monkeypatch.setattr(child, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        render(source, {**CHAT, "messages": [{"content": "the one before"}]})
    assert render(source, CHAT) == "<s>Hi; "
    assert child.poll() is not None


def test_a_process_that_was_killed_is_one_sentence_and_begun_anew() -> None:
    source = GOOD + "!"
    render(source, CHAT)
    child = template._process(source).child
    assert child is not None
    child.send_signal(signal.SIGKILL)
    child.wait()
    with pytest.raises(UserError, match=r"^broke the process that renders it \(status -9\)$"):
        render(source, CHAT)
    assert render(source, CHAT) == "<s>Hi!"


def test_the_process_has_no_secrets_may_write_no_file_and_ends_with_its_template(monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    source = GOOD + "?"
    render(source, CHAT)
    child = template._process(source).child
    assert child is not None
    status = Path(f"/proc/{child.pid}")
    assert b"hf_secret" not in (status / "environ").read_bytes()
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (status / "limits").read_text().splitlines()}
    assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]
    assert limits["Max address space"] == [str(template.MEMORY_LIMIT)] * 2
    for number in range(5):  # four templates are kept
        render(f"{GOOD}{number}", CHAT)
    for _ in range(100):
        if child.poll() is not None:
            break
        time.sleep(0.05)
    assert child.returncode is not None


@pytest.mark.parametrize("content", ["\ud800", "\x00\x1b\u202e", "a\nb\r\n", "🙂" * 1000, "x" * 1_000_000])
def test_contents_go_there_and_back_unchanged(content: str) -> None:
    assert render(GOOD, {**CHAT, "messages": [{"content": content}]}) == "<s>" + content
