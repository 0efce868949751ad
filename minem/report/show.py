"""`minem show`: samples of a run in the terminal.

minem show runs/toy.rsm8.toy-llama.s0 --iteration 1 --status wrong -n 5
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minem.console import Progress
from minem.errors import UserError
from minem.report.reader import checked, read_run
from minem.text import clean


def show(
    run: Path, iteration: int | None, status: str | None, question: str | None, n: int
) -> tuple[dict[str, Any], list[str]]:
    """The first n samples that match, as a result and as lines. UserError for an unknown iteration or question."""
    with checked(run):
        read = read_run(run)
        drawn = [i for i in read.iterations if read.result(i, "estep")]
        if not drawn:
            raise UserError(f"{run} has no finished E-step yet, so there are no samples to show")
        if iteration not in (None, *drawn):
            raise UserError(f"--iteration {iteration}: {run} has samples of iteration {', '.join(map(str, drawn))}")
        rows, matched, found = [], 0, question is None
        for row in read.samples(iteration):
            if question in (None, row.id):
                found = True
                matched += status in (None, row.status)
                if status in (None, row.status) and matched <= n:
                    rows.append({**vars(row), "prompt_text": read.prompt(row.id, row.prompt)})
        if not found:
            raise UserError(f"--question {question}: {run} has no samples of such a question")
        text = list(lines(rows))
    if rows and isinstance(read.task, str):
        Progress().note(f"note    {read.task}")
    text.append(f"{len(rows):,} of {matched:,} samples that match" + ("; -n shows more" if matched > n else ""))
    return {"run": str(run), "matched": matched, "samples": rows}, text


def lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The text for a person; a prompt is not repeated from one row to the next."""
    before = None
    for row in rows:
        facts = [row["status"].upper(), row["id"], f"iteration {row['iteration']}", f"attempt {row['attempt']}"]
        facts += [f"{row['prompt']} prompt", f"answer {row['answer'] or 'none'}", f"right: {row['gold']}"]
        facts += [f"{len(row['token_ids'])} tokens"]
        for name, key in (("log q", "logprob_q"), ("log p", "logprob_plain")):
            facts += [] if row[key] is None else [f"{name} {row[key]:.2f}"]
        facts += ["cites the hint"] * row["leak"]
        yield "── " + clean("  ".join(facts))
        if row["prompt_text"] not in (None, before):
            yield _indented(row["prompt_text"], "│ ")
        before = row["prompt_text"]
        yield _indented(row["text"], "  ") + "\n"


def _indented(text: str, mark: str) -> str:
    return "\n".join(mark + line for line in clean(text, keep_lines=True).split("\n"))
