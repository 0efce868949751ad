"""Strategies that damage good files: values of JSON trees exchanged for odd ones, and bytes flipped, cut and doubled.

A file that is nearly right gets further into a reader than noise, and finds more. Also here: text that a terminal or a
browser acts on, and the check that none of it gets through.
"""

from __future__ import annotations

import copy
import json
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from minem.errors import MinemError
from minem.text import BIDI_CONTROLS, SENTENCE_LIMIT

TRIED: Counter[str] = Counter()  # cases by kind of file; tests/conftest.py prints it

HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07\r\x08\x9b31m<script>alert(1)</script><img src=x onerror=a()>\u202egnp.exe\u2066\u2028\x00"
)
ODD_TEXTS = [
    "",
    " ",
    HOSTILE,
    "x" * 20_000,
    "\ud800",
    "../../etc/passwd",
    "/",
    "NaN",
    "{{ 1 }}",
    "a\nb",
    "[/red]",
    "%s",
]
ODD_NUMBERS = [0, -1, 1, 2, 2**31, 2**63, 10**30, -(2**63), 0.5, 1e308, -0.0, 5e-324]
ODD: list[Any] = [None, True, False, [], {}, [[]], {"": None}, [None] * 100, *ODD_TEXTS, *ODD_NUMBERS]
DEEP = "a deep list"  # becomes lists in lists in the text of the file: no Python value can be as deep
ODD += [DEEP, float("nan"), float("inf"), [1, "a", None, 2.5], {"a": {"b": {"c": [{}]}}}]


def odd_values() -> st.SearchStrategy[Any]:
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
    trees = st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner))
    return st.sampled_from(ODD) | trees


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything in the tree; of long lists only the first few."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node)[:40] if isinstance(node, dict) else range(min(len(node), 6)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            waiting.append(node[key])
    return found


@st.composite
def damaged_trees(draw: st.DrawFn, good: Any, most: int = 4) -> Any:
    """A JSON value with up to `most` changes: values exchanged, removed, moved, keys renamed and added."""
    tree = copy.deepcopy(good)
    for _ in range(draw(st.integers(0, most))):
        places = _places(tree)
        if not places:
            break
        node, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(["exchange", "exchange", "exchange", "remove", "move", "add"]))
        if what == "exchange":
            node[key] = copy.deepcopy(draw(odd_values()))
        elif what == "remove":
            del node[key]
        elif what == "move":
            other, place = draw(st.sampled_from(places))
            node[key] = copy.deepcopy(other[place])
        elif isinstance(node, dict):
            node[draw(st.text(max_size=12) | st.sampled_from(ODD_TEXTS))] = copy.deepcopy(draw(odd_values()))
        else:
            node.insert(0, copy.deepcopy(draw(odd_values())))
    return tree


@st.composite
def damaged_bytes(draw: st.DrawFn, good: bytes, most: int = 3) -> bytes:
    """Bytes with up to `most` of them flipped, cut out, put in, doubled, or the end cut off."""
    data = bytearray(good)
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from([1, 2, 8, 100]))
        what = draw(st.sampled_from(["flip", "cut", "put", "double", "end"]))
        if what == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif what == "cut":
            del data[at : at + length]
        elif what == "put":
            data[at:at] = draw(st.binary(min_size=1, max_size=12))
        elif what == "double":
            data[at:at] = data[at : at + length]
        else:
            del data[at:]
    return bytes(data)


@st.composite
def damaged_json(draw: st.DrawFn, good: Any, most: int = 4) -> bytes:
    """The bytes of a JSON file: the value damaged, sometimes the text of it too, or a key written twice."""
    text = json.dumps(draw(damaged_trees(good, most)), ensure_ascii=draw(st.booleans()))
    text = text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    data = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        data = draw(damaged_bytes(data))
    if draw(st.integers(0, 15)) == 0:
        data = data.replace(b"{", b'{"id": 1, "id": 2, ', 1)
    return data


def fuzz(what: str, cases: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Run `check` on cases of `strategy`: the same ones each time in the quick suite, others in the slow one."""

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=cases <= 25,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # to shrink a file takes minutes, and the wrong sentence is enough
        print_blob=True,
    )
    @given(strategy)
    def each(case: Any) -> None:
        TRIED[what] += 1
        check(case)

    each()


def accepted_or_refused(act: Callable[[], Any], *names: str) -> bool:
    """Whether it was accepted; a refusal must be one sentence with one of the names in it."""
    try:
        act()
    except MinemError as error:
        message = str(error)
        assert message
        assert_harmless(message)
        assert "\n" not in message
        assert len(message) <= SENTENCE_LIMIT + 100
        assert any(name in message for name in names), message
        return False
    return True


def assert_harmless(shown: str) -> None:
    """Only line breaks and tabs of what a terminal acts on, and nothing that reverses a line."""
    for character in set(shown):
        unsafe = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in BIDI_CONTROLS
        assert not unsafe or character in "\n\t", f"{character!r} in {shown!r}"
