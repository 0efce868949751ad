"""The report: one HTML file about one run or many, which needs nothing but a browser.

    minem report runs/toy.rsm8.toy-llama.s0 -o report.html

A pure reader of run directories, unfinished ones too. Runs that differ in nothing but their seed are one line of each
chart. The page is minem/page.html, .css and .js; texts of models and files reach it as JSON and as text nodes, never as
HTML, and its content security policy lets no script run but its own and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import minem
from minem.em.diagnostics import FALLING_RULE
from minem.errors import UserError
from minem.files import own_file, read_limited
from minem.report import figures
from minem.report.charts import themed
from minem.report.reader import Choice, Run, changed, read_run, told_as_damage
from minem.text import redact, visible

MOST_SAMPLES = 2_000  # rows of samples.jsonl in a page
MOST_FLIPS = 200
CHARACTERS = 2_000_000  # of their texts, in all
TEXT_LIMIT = 10_000  # characters of one text
SIZE_LIMIT = 1 << 20  # bytes of a config
PAGE = Path(__file__).parent


def write_report(runs: Sequence[Path], out: Path, comparison: Mapping[str, Any] | None = None) -> None:
    """Write the report on these run directories.

    comparison: of `minem compare`: "tables" (a list of {title, note, columns, rows}) and "plots" (of {title, svg}) are
        shown before all else, where they are there.
    Raises UserError for what is no run directory, or a file that cannot be written.
    """
    if not out.name or os.path.isdir(out):
        raise UserError(f"the report {out} cannot be written: that is a folder")
    with told_as_damage(*runs):
        page = render([read_run(path) for path in runs], comparison or {})
    partial = out.with_name(f".partial.{out.name}")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"the report {out} cannot be written: {error.strerror or error}") from error


def render(runs: Sequence[Run], comparison: Mapping[str, Any]) -> str:
    """The page as a text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = lambda value: visible(str(value))
    names = _names(runs)
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs",
        version=minem.__version__,
        style=(PAGE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        tables=[_comparison_table(table) for table in comparison.get("tables") or ()],
        plots=[
            {"title": plot["title"], "svg": themed(plot["svg"], f"comparison {number} {plot['title']}")}
            for number, plot in enumerate(comparison.get("plots") or ())
        ],
        summary=[figures.summary(name, run) for name, run in zip(names, runs, strict=True)],
        warnings=figures.warnings(names, runs),
        tasks=figures.by_task(runs),
        stages=[
            {"name": name, **stages}
            for name, run in zip(names, runs, strict=True)
            if (stages := figures.acceptance_by_stage(run))
        ],
        falls=figures.falls(names, runs),
        falling_rule=FALLING_RULE,
        runs=[_reproduction(name, run) for name, run in zip(names, runs, strict=True)],
        data=_for_script(_browsers(names, runs)),
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, or their whole paths where two have the same name."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else str(run.path) for run in runs]


def _comparison_table(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: table.get(key) or "" for key in ("title", "note")} | {
        "columns": list(table.get("columns") or ()),
        "rows": [["" if cell is None else cell for cell in row] for row in table.get("rows") or ()],
    }


def _reproduction(name: str, run: Run) -> dict[str, Any]:
    """What it takes to do a run again."""
    facts, command = run.facts, run.facts.get("command")
    words = ["minem", *map(str, command[1:])] if isinstance(command, list) and command else []
    config = own_file(run.path, "config.toml")
    return {
        "name": name,
        "path": str(run.path),
        "command": redact(shlex.join(words)),
        "again": shlex.join(["minem", "train", str(config), "--out", "NEW"]),
        "config": read_limited(config, SIZE_LIMIT).decode(errors="replace") if config.exists() else "",
        "facts": {
            "started": facts.get("started"),
            "minem's commit": facts.get("commit") or "not known",
            "platform": facts.get("platform"),
            "versions": ", ".join(f"{package} {version}" for package, version in (facts.get("versions") or {}).items()),
            **{f"{what}, SHA-256": digest for what, digest in (facts.get("inputs") or {}).items()},
        },
    }


# --------------------------------------------------------------------------------------------------- the two browsers


class _Texts:
    """Texts that many rows share, each kept once; a row has its number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, text: str | None) -> int | None:
        return None if text is None else self.numbers.setdefault(_shortened(text), len(self.numbers))


def _shortened(text: str) -> str:
    rest = len(text) - TEXT_LIMIT
    return visible(text) if rest <= 0 else f"{visible(text[:TEXT_LIMIT])} … ({rest:,} more characters)"


def _browsers(names: Sequence[str], runs: Sequence[Run]) -> dict[str, Any]:
    """What the page's script shows: samples, and test answers that changed."""
    choice = Choice(MOST_SAMPLES, CHARACTERS)
    for number, run in enumerate(runs):
        for row in run.samples():
            choice.add(number, row)
    prompts = _Texts()
    samples = [_sample(number, row, runs[number], prompts) for number, row in choice.chosen()]
    flips, total = _flips(runs, prompts)
    return {
        "runs": [visible(name) for name in names],
        "notes": sorted({visible(run.task) for run in runs if isinstance(run.task, str)}),
        "prompts": list(prompts.numbers),
        "samples": _compact(samples),
        "samples_total": choice.seen,
        "flips": _compact(flips),
        "flips_total": total,
    }


def _sample(number: int, row: Mapping[str, Any], run: Run, prompts: _Texts) -> dict[str, Any]:
    return {
        "run": number,
        "iteration": row["iteration"],
        "attempt": row["attempt"],
        "id": visible(row["id"]),
        "kind": visible(row["prompt"]),
        "status": visible(row["status"]),
        "leak": bool(row.get("leak")),
        "answer": _or_none(row.get("answer")),
        "gold": _or_none(row.get("gold")),
        "tokens": len(row["token_ids"]),
        "logq": _finite(row.get("logprob_q")),
        "logp": _finite(row.get("logprob_plain")),
        "text": _shortened(row["text"]),
        "prompt": prompts.number(run.prompt(row["id"], row["prompt"])),
    }


def _flips(runs: Sequence[Run], prompts: _Texts) -> tuple[list[dict[str, Any]], int]:
    """Answers that changed, as many of each run, and how many there are in all."""
    finished = [(number, run) for number, run in enumerate(runs) if run.last_test is not None]
    flips, total = [], 0
    for number, run in finished:
        base, last = run.answers(0, "test"), run.answers(run.last_test or 0, "test")
        lost, won = changed(base, last)
        total += len(lost) + len(won)
        share = max(2, MOST_FLIPS // len(finished))
        shown_lost = lost[: max(share // 2, share - len(won))]
        for id_ in [*shown_lost, *won[: share - len(shown_lost)]]:
            flips.append(
                {
                    "run": number,
                    "id": visible(id_),
                    "kind": "became wrong" if base[id_]["status"] == "accepted" else "became right",
                    "gold": _or_none(base[id_].get("gold")),
                    "before": _shortened(base[id_]["text"]),
                    "after": _shortened(last[id_]["text"]),
                    "answers": [_or_none(base[id_].get("answer")), _or_none(last[id_].get("answer"))],
                    "statuses": [visible(base[id_]["status"]), visible(last[id_]["status"])],
                    "prompt": prompts.number(run.prompt(id_, split="test")),
                }
            )
    return flips, total


def _compact(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of the same keys, each key written once."""
    return {"columns": list(rows[0]) if rows else [], "rows": [list(row.values()) for row in rows]}


def _or_none(value: Any) -> str | None:
    return None if value is None else visible(str(value))


def _finite(value: Any) -> float | None:
    return round(value, 3) if isinstance(value, int | float) and abs(value) < 1e9 else None


def _for_script(data: Any) -> str:
    """JSON that can stand inside a <script>: nothing in it can end the element, begin another, or end a line."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode()
