"""`minem show`: samples of a run in the terminal.

minem show runs/toy.rsm8.toy-llama.s0 --iteration 1 --status wrong -n 5
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minem.errors import UserError
from minem.report.reader import Run, checked, read_run
from minem.text import clean


def show(
    run: Path, iteration: int | None, status: str | None, question: str | None, n: int
) -> tuple[dict[str, Any], list[str]]:
    """The samples of a run that match, as a result and as lines for a person."""
    with checked(run):
        read = read_run(run)
        rows, matched = matching(read, n, iteration, status, question)
        text = list(lines(rows))
    if rows and isinstance(read.task, str):
        text.insert(0, clean(f"note    {read.task}"))
    text.append(f"{len(rows):,} of {matched:,} samples that match" + ("; -n shows more" if matched > n else ""))
    return {"run": str(run), "matched": matched, "samples": rows}, text


def matching(
    run: Run, n: int, iteration: int | None, status: str | None, question: str | None
) -> tuple[list[dict[str, Any]], int]:
    """The first n samples that match, each with the words of its prompt as `prompt_text`, and how many match in all.

    Raises UserError if the run has no such iteration or question.
    """
    drawn = run.drawn
    if not drawn:
        raise UserError(f"{run.path} has no finished E-step yet, so there are no samples to show")
    if iteration is not None and iteration not in drawn:
        raise UserError(f"--iteration {iteration}: {run.path} has samples of iteration {', '.join(map(str, drawn))}")
    first: list[dict[str, Any]] = []
    matched, found = 0, question is None
    for row in run.samples(iteration):
        if question not in (None, row.id):
            continue
        found = True
        if status in (None, row.status):
            matched += 1
            if len(first) < n:
                first.append({**vars(row), "prompt_text": run.prompt(row.id, row.prompt)})
    if not found:
        raise UserError(f"--question {question}: {run.path} has no samples of such a question")
    return first, matched


def lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The text for a person; a prompt is not repeated from one row to the next."""
    before = None
    for row in rows:
        facts = [row["status"].upper(), row["id"], f"iteration {row['iteration']}", f"attempt {row['attempt']}"]
        facts += [f"{row['prompt']} prompt", f"answer {row['answer'] or 'none'}", f"right: {row['gold']}"]
        facts += [f"{len(row['token_ids'])} tokens"]
        logprobs = {"log q": row["logprob_q"], "log p": row["logprob_plain"]}
        facts += [f"{name} {value:.2f}" for name, value in logprobs.items() if value is not None]
        facts += ["cites the hint"] * row["leak"]
        yield "── " + clean("  ".join(facts))
        if row["prompt_text"] not in (None, before):
            yield _indented(row["prompt_text"], "│ ")
        before = row["prompt_text"]
        yield _indented(row["text"], "  ")
        yield ""


def _indented(text: str, mark: str) -> str:
    return "\n".join(mark + line for line in clean(text, keep_lines=True).split("\n"))
