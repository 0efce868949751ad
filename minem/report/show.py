"""Samples of a run in the terminal.

minem show runs/toy.rsm8.toy-llama.s0 --iteration 1 --status wrong -n 5
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from minem.report.reader import Run, select
from minem.text import clean


def matching(
    run: Run, n: int, iteration: int | None, status: str | None, question: str | None
) -> tuple[list[dict[str, Any]], int]:
    """The first n samples that were asked for, each with the words of its `prompt_text`, and how many match in all."""
    rows = select(run, iteration, status, question)
    first = [{**row, "prompt_text": run.prompt(row["id"], row["prompt"])} for row in islice(rows, n)]
    return first, len(first) + sum(1 for _ in rows)


def lines(rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """What a person reads of these rows; a prompt is not repeated from one row to the next."""
    before = None
    for row in rows:
        facts = [
            row["status"].upper(),
            row["id"],
            f"iteration {row['iteration']}",
            f"attempt {row['attempt']}",
            f"{row['prompt']} prompt",
            f"answer {row.get('answer') or 'none'}",
            f"right: {row.get('gold')}",
            f"{len(row['token_ids'])} tokens",
            *_logprobs(row),
            *(["cites the hint"] if row.get("leak") else []),
        ]
        yield "── " + clean("  ".join(facts))
        if row["prompt_text"] is not None and row["prompt_text"] != before:
            yield _indented(row["prompt_text"], "│ ")
        before = row["prompt_text"]
        yield _indented(row["text"], "  ")
        yield ""


def _logprobs(row: Mapping[str, Any]) -> list[str]:
    named = (("log q", row.get("logprob_q")), ("log p", row.get("logprob_plain")))
    return [f"{name} {value:.2f}" for name, value in named if isinstance(value, int | float)]


def _indented(text: str, mark: str) -> str:
    return "\n".join(mark + line for line in clean(text, keep_lines=True).split("\n"))
