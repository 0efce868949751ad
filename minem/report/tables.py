"""What commands print for people when they are done: the tables and lines on stdout.

The last lines of `minem train`, `minem compare` and `minem eval` come from here; --json prints the same numbers.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from minem.console import percent, table
from minem.text import clean


def say(text: str, err: bool = False) -> None:
    """Print what may be quoted from files and models."""
    click.echo(clean(text, keep_lines=True), err=err)


def train_table(result: dict[str, Any]) -> None:
    """The short table that a run ends with."""
    rows = []
    for row in result["iterations"]:
        estep, mstep, validation = row.get("estep"), row.get("mstep"), row["validation"]
        rows.append(
            [
                row["iteration"] or "base",
                percent(validation["accuracy"], (validation["low"], validation["high"])),
                "" if validation["sampled"] is None else percent(validation["sampled"]),
                f"{estep['solved']}/{estep['questions']}" if estep else "",
                f"{estep['attempts']:,}" if estep else "",
                f"{estep['tokens']:,}" if estep else "",
                percent(estep["valid"]) if estep and estep["valid"] is not None else "",
                f"{mstep['loss']:.4f}" if mstep else "",
            ]
        )
    columns = [
        "iteration",
        "validation, greedy",
        "temperature 1",
        "solved",
        "attempts",
        "tokens drawn",
        "valid",
        "loss",
    ]
    shown = [i for i in range(len(columns)) if any(row[i] != "" for row in rows)]
    table([columns[i] for i in shown], [[row[i] for i in shown] for row in rows], file=sys.stdout)
    test = result["test"]
    base, last = test["base"], test["last"]
    say(
        f"test ({base['n']} questions, greedy): {percent(base['accuracy'], (base['low'], base['high']))} -> "
        f"{percent(last['accuracy'], (last['low'], last['high']))}; {test['wrong_to_right']} became right, "
        f"{test['right_to_wrong']} became wrong, McNemar p = {test['mcnemar_p']:.2g}"
    )
    say(f"model: {result['model']}   report: {result['run']}/report.html")


def mstep_line(result: dict[str, Any]) -> None:
    say(f"loss {result['loss']:.4f}, model in {result['model']}")


def compare_tables(result: dict[str, Any]) -> None:
    for one in result["tables"]:
        table(one["columns"], one["rows"], title=one["title"], file=sys.stdout)
        say(f"{one['note']}\n")
    if result["runs"]:
        say(f"report: {result['out']}/report.html   picture: {result['out']}/comparison.png")


def eval_table(named: dict[str, Any], summary: dict[str, Any]) -> None:
    rows = [["accuracy, greedy", percent(summary["accuracy"], (summary["low"], summary["high"]))]]
    if summary["sampled"] is not None:
        rows.append(["accuracy, temperature 1", percent(summary["sampled"])])
    rows += [[f"pass@{k}", percent(share)] for k, share in summary.get("pass_at_k", {}).items()]
    if "majority" in summary:
        rows.append(["majority vote", percent(summary["majority"])])
    rows += [
        ["accuracy, lenient reading", percent(summary["flexible"])],
        ["unparsed", percent(summary["unparsed"])],
        ["truncated", percent(summary["truncated"])],
        ["tokens per answer", f"{summary['tokens']:.1f}"],
    ]
    table([f"{named['model']} on {named['task']}", f"{named['split']}, n = {summary['n']}"], rows, file=sys.stdout)
    if "subjects" in summary:
        subjects = summary["subjects"].items()
        rows = [[name, str(s["n"]), percent(s["accuracy"], (s["low"], s["high"]))] for name, s in subjects]
        table(["subject", "n", "accuracy, greedy"], rows, file=sys.stdout)
    say(f"answers: {named['answers']}")
