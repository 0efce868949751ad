"""What commands print for people when they are done: the tables and lines on stdout.

The last lines of `minem train`, `minem compare` and `minem eval` come from here; --json prints the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from minem.console import percent, table
from minem.text import clean


def say(text: str, err: bool = False) -> None:
    """Print what may be quoted from files and models."""
    click.echo(clean(text, keep_lines=True), err=err)


def train_table(result: dict[str, Any]) -> None:
    """The table that a run ends with, without the columns that are empty."""
    rows: list[dict[str, Any]] = []
    for row in result["iterations"]:
        estep, mstep, validation = row.get("estep"), row.get("mstep"), row["validation"]
        cells = {"iteration": row["iteration"] or "base", "validation, greedy": accuracy(validation)}
        if validation["sampled"] is not None:
            cells["temperature 1"] = percent(validation["sampled"])
        if estep:
            cells["solved"] = f"{estep['solved']}/{estep['questions']}"
            cells["attempts"], cells["tokens drawn"] = f"{estep['attempts']:,}", f"{estep['tokens']:,}"
            cells |= {} if estep["valid"] is None else {"valid": percent(estep["valid"])}
        if mstep:
            cells["loss"] = f"{mstep['loss']:.4f}"
        rows.append(cells)
    columns = list(dict.fromkeys(column for cells in rows for column in cells))
    table(columns, [[cells.get(column, "") for column in columns] for cells in rows], file=sys.stdout)
    test = result["test"]
    say(
        f"test ({test['base']['n']} questions, greedy): {accuracy(test['base'])} -> {accuracy(test['last'])}; "
        f"{test['wrong_to_right']} became right, {test['right_to_wrong']} became wrong, "
        f"McNemar p = {test['mcnemar_p']:.2g}"
    )
    say(f"model: {result['model']}   report: {result['run']}/report.html")


def mstep_line(result: dict[str, Any]) -> None:
    say(f"loss {result['loss']:.4f}, model in {result['model']}")


def sample_line(result: dict[str, Any]) -> None:
    solved, questions = result["solved"], result["questions"]
    say(f"{solved}/{questions} questions solved ({percent(solved / questions)}), rows in {result['samples']}")


def completions(results: Sequence[Mapping[str, Any]]) -> None:
    """What `minem generate` prints; the prompts too, if there are several."""
    for result in results:
        if len(results) > 1:
            say(f"> {clean(result['prompt'])}")
        for completion in result["completions"]:
            say(completion["text"])


def compare_tables(result: dict[str, Any]) -> None:
    for one in result["tables"]:
        table(one["columns"], one["rows"], title=one["title"], file=sys.stdout)
        say(f"{one['note']}\n")
    if result["runs"]:
        say(f"report: {result['out']}/report.html   picture: {result['out']}/comparison.png")


def eval_table(summary: dict[str, Any]) -> None:
    rows = {"accuracy, greedy": accuracy(summary)}
    if summary["sampled"] is not None:
        rows["accuracy, temperature 1"] = percent(summary["sampled"])
    rows |= {f"pass@{k}": percent(share) for k, share in summary.get("pass_at_k", {}).items()}
    if "majority" in summary:
        rows["majority vote"] = percent(summary["majority"])
    rows["accuracy, lenient reading"] = percent(summary["flexible"])
    rows |= {key: percent(summary[key]) for key in ("unparsed", "truncated")}
    rows["tokens per answer"] = f"{summary['tokens']:.1f}"
    columns = [f"{summary['model']} on {summary['task']}", f"{summary['split']}, n = {summary['n']}"]
    table(columns, list(rows.items()), file=sys.stdout)
    if "subjects" in summary:
        subjects = [[name, str(s["n"]), accuracy(s)] for name, s in summary["subjects"].items()]
        table(["subject", "n", "accuracy, greedy"], subjects, file=sys.stdout)
    say(f"answers: {summary['answers']}")


def accuracy(result: Mapping[str, Any]) -> str:
    """With its 95 % interval, like "61.3 % (57.0-65.4)"."""
    return percent(result["accuracy"], (result["low"], result["high"]))
