"""What commands print for people when they are done; --json prints the same numbers.

minem eval
"""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from minem.console import percent, table
from minem.text import clean


def say(text: str) -> None:
    """Print what may be quoted from files and models."""
    click.echo(clean(text, keep_lines=True))


def train_table(result: dict[str, Any]) -> None:
    """The table that a run ends with, without the columns that are empty."""
    rows = []
    for row in result["iterations"]:
        sampled = row["validation"]["sampled"]
        cells = {"iteration": row["iteration"] or "base", "validation, greedy": accuracy(row["validation"])}
        cells |= {} if sampled is None else {"temperature 1": percent(sampled)}
        if estep := row.get("estep"):
            cells["solved"] = f"{estep['solved']}/{estep['questions']}"
            cells["attempts"], cells["tokens drawn"] = estep["attempts"], estep["tokens"]
            cells |= {} if estep["valid"] is None else {"valid": percent(estep["valid"])}
            cells["loss"] = f"{row['mstep']['loss']:.4f}"
        rows.append(cells)
    columns = list(dict.fromkeys(column for cells in rows for column in cells))
    table(columns, [[cells.get(column, "") for column in columns] for cells in rows])
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
        table(one["columns"], one["rows"], title=one["title"])
        say(f"{one['note']}\n")
    if result["runs"] and "out" in result:
        say(f"report: {result['out']}/report.html   picture: {result['out']}/comparison.png")


def eval_table(summary: dict[str, Any]) -> None:
    shares = {"accuracy, temperature 1": summary["sampled"]}
    shares |= {f"pass@{k}": share for k, share in summary.get("pass_at_k", {}).items()}
    shares |= {"majority vote": summary.get("majority"), "accuracy, lenient reading": summary["flexible"]}
    shares |= {key: summary[key] for key in ("unparsed", "truncated")}
    rows = [("accuracy, greedy", accuracy(summary))]
    rows += [(name, percent(share)) for name, share in shares.items() if share is not None]
    columns = [f"{summary['model']} on {summary['task']}", f"{summary['split']}, n = {summary['n']}"]
    table(columns, [*rows, ("tokens per answer", f"{summary['tokens']:.1f}")])
    if "subjects" in summary:
        subjects = [[name, str(s["n"]), accuracy(s)] for name, s in summary["subjects"].items()]
        table(["subject", "n", "accuracy, greedy"], subjects)
    say(f"answers: {summary['answers']}")


def accuracy(result: Mapping[str, Any]) -> str:
    """With its 95 % interval, like "61.3 % (57.0-65.4)"."""
    return percent(result["accuracy"], (result["low"], result["high"]))
