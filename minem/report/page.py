"""The report: one HTML file about one run or many, which needs nothing but a browser.

    minem report runs/toy.rsm8.toy-llama.s0 -o report.html

Runs that differ in their seed alone are one line of each chart. The page is page.html, .css and .js beside this file.
Texts of models and files reach it as JSON and as text nodes, never as HTML; its content security policy lets no other
script run and nothing be fetched.
"""

import base64
import hashlib
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import minem
from minem.errors import UserError
from minem.files import TOML_LIMIT, own_file, read_limited, write_atomic
from minem.report import figures
from minem.report.reader import SAMPLE, Run, checked, choose, read_run
from minem.text import redact, visible

MOST_SAMPLES = 2_000  # rows of samples.jsonl in a page
MOST_FLIPS = 200
CHARACTERS = 2_000_000  # of the samples' texts together
TEXT_LIMIT = 10_000  # characters of one text
PAGE = Path(__file__).parent
MARK = b'<meta name="generator" content="minem '  # stands in the first bytes of each report


def write_report(runs: Sequence[Path], out: Path, comparison: Mapping[str, Any] | None = None) -> None:
    """Write the report on these run directories. UserError if one is none, or if the file cannot be written.

    comparison: "tables" ({title, note, columns, rows}) and "plots" ({title, svg}, inserted as they are), shown first.
    """
    if not out.name or os.path.isdir(out):
        raise UserError(f"the report {out} cannot be written: that is a folder")
    with checked(*runs):
        page = _render([read_run(path) for path in runs], comparison or {})
    try:
        write_atomic(out, page.encode())
    except OSError as error:
        raise UserError(f"the report {out} cannot be written: {error.strerror or error}") from error


def check_place(out: Path) -> None:
    """UserError if `out` lies in a run directory, or is there already and no report that minem wrote."""
    where, page = Path(os.path.realpath(out)), b""
    if inside := next((folder for folder in where.parents if os.path.exists(folder / "run.json")), None):
        raise UserError(f"-o {out} lies in the run directory {inside}; choose a place outside of it")
    if os.path.isfile(out) and not os.path.islink(out):
        with suppress(OSError), out.open("rb") as file:
            page = file.read(1_000)
    if os.path.lexists(out) and not os.path.isdir(out) and MARK not in page:
        raise UserError(f"-o {out} is there already and no report of minem, so it is not replaced; choose another name")


def _render(runs: Sequence[Run], comparison: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["visible"] = lambda value: visible(str(value))
    names = [run.path.resolve().name for run in runs]
    named = [(n if names.count(n) == 1 else str(run.path), run) for n, run in zip(names, runs, strict=True)]
    style, script = ((PAGE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return environment.get_template("page.html").render(
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs",
        version=minem.__version__,
        style=style,
        script=script,
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        tables=comparison.get("tables", ()),
        plots=comparison.get("plots", ()),
        summary=[figures.summary(*one) for one in named],
        warnings=[sentence for one in named for sentence in figures.warnings(*one)],
        tasks=figures.by_task(runs),
        runs=[_reproduction(*one) for one in named],
        data=_lists(named),
    )


def _reproduction(name: str, run: Run) -> dict[str, Any]:
    """What it takes to do a run again."""
    facts, config = run.facts, own_file(run.path, "config.toml")
    return {
        "name": name,
        "path": str(run.path),
        "command": redact(shlex.join(["minem", *map(str, facts["command"][1:])])) if facts.get("command") else "",
        "again": shlex.join(["minem", "train", str(config), "--out", "NEW"]),
        "config": read_limited(config, TOML_LIMIT).decode(errors="replace") if config.exists() else "",
        "facts": {
            "started": facts.get("started"),
            "minem's commit": facts.get("commit") or "not known",
            "platform": facts.get("platform"),
            "versions": ", ".join(f"{package} {version}" for package, version in facts.get("versions", {}).items()),
            **{f"{name}, SHA-256": digest for name, digest in facts.get("inputs", {}).items()},
        },
    }


def _lists(named: Sequence[tuple[str, Run]]) -> dict[str, Any]:
    """What the page's script shows: samples, and test answers that changed. Rows share their prompts."""
    runs = [run for _, run in named]
    chosen, total = choose(runs, MOST_SAMPLES, CHARACTERS)
    samples, flips = [], _flips(runs)
    for number, one in chosen:
        more = {"run": number, "kind": one.prompt, "tokens": len(one.token_ids)}
        more["prompt"] = runs[number].prompt(one.id, one.prompt)
        samples.append({name: getattr(one, name) for name in SAMPLE if name != "token_ids"} | more)
    prompts: dict[str, int] = {}
    for row in samples + flips:
        if row["prompt"] is not None:
            row["prompt"] = prompts.setdefault(row["prompt"], len(prompts))
    return {
        "runs": [visible(name) for name, _ in named],
        "notes": sorted({visible(run.task) for run in runs if isinstance(run.task, str)}),
        "prompts": _shown(list(prompts)),
        "samples": _compact(samples),
        "samples_total": total,
        "flips": _compact(flips),
        "flips_total": sum(len(ids) for run in runs for ids in run.flips),
    }


def _flips(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Answers that changed from the base to the last model: of each run an equal share, of both directions."""
    tested = [(number, run, run.last_test) for number, run in enumerate(runs) if run.last_test is not None]
    share, flips = max(2, MOST_FLIPS // max(1, len(tested))), []
    for number, run, iteration in tested:
        lost, won = run.flips
        lost = lost[: max(share // 2, share - len(won))]
        base, last = run.answers(0, "test"), run.answers(iteration, "test")
        for id_ in lost + won[: share - len(lost)]:
            before, after = base[id_], last[id_]
            kind = "became wrong" if before.status == "accepted" else "became right"
            row = {"run": number, "id": id_, "kind": kind, "gold": before.gold, "before": before.text}
            row |= {"after": after.text, "prompt": run.prompt(id_, split="test")}
            row |= {"answers": [before.answer, after.answer], "statuses": [before.status, after.status]}
            flips.append(row)
    return flips


def _compact(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of the same keys, each key written once."""
    return {"columns": list(rows[0]) if rows else [], "rows": [_shown(list(row.values())) for row in rows]}


def _shown(value: Any) -> Any:
    """The value as the page has it: of long texts the beginning, of numbers three digits after the point."""
    if isinstance(value, list):
        return [_shown(one) for one in value]
    if isinstance(value, str):
        rest = len(value) - TEXT_LIMIT
        return visible(value[:TEXT_LIMIT]) + (f" … ({rest:,} more characters)" if rest > 0 else "")
    return round(value, 3) if isinstance(value, float) else value
