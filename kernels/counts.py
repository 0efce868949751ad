"""What the kernels execute: warp instructions, bytes and CTAs, counted by running their PTX on the CPU; and the
launches of a decode step. A count is no time, but it says what a GPU has to do before one is at hand.

    python -m minem.kernels.counts --target sm_90

A warp instruction is a PTX instruction that one warp executes. Bytes are those that a CTA's instructions ask for: what
two instructions ask for counts twice, although a cache may serve the second. For checkouts of the repository, whose
tests hold the machine that runs PTX.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path

import click

BATCHES = (1, 16, 256)


@click.command()
@click.option("--target", type=click.Choice(["sm_80", "sm_90"]), default="sm_90", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def main(target: str, as_json: bool) -> None:
    """Count what every kernel executes at the shapes of four models, and the launches of their decode steps."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "tests/kernels/ptx").is_dir():
        raise click.UsageError("the counts need the tests of the repository: run this in a checkout of it")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise click.UsageError("unset TRITON_INTERPRET: the interpreter compiles nothing")
    sys.path[:0] = [str(root), str(root / "bench")]
    counting = import_module("tests.kernels.counting")
    launches = {
        shape.name: {batch: counting.launches_of_a_step(shape, batch).total() for batch in BATCHES}
        for shape in counting.SHAPES
    }
    import_module("tests.kernels.ptx.launch").install(target)
    cases = list(counting.cases())
    kernels = [counting.count(case) for case in cases]
    if as_json:
        click.echo(json.dumps({"target": target, "kernels": kernels, "launches_per_step": launches}))
        return
    rows = [("kernel", "variant", "warp instructions / row", "bytes read", "written", "floor", "CTAs", "idle")]
    for case, counted in zip(cases, kernels, strict=True):
        kernel, variant, *numbers, ctas, idle = counted.values()
        rows.append((kernel, variant, *(f"{n:,}" for n in (*numbers, case.floor_bytes, ctas, idle))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left, right = row[:2], row[2:]
        click.echo("  ".join([*map(str.ljust, left, widths), *map(str.rjust, right, widths[2:])]))
    for model, steps in launches.items():
        each = ", ".join(f"{number} at B={batch}" for batch, number in steps.items())
        click.echo(f"launches of a decode step of {model}: {each}")


if __name__ == "__main__":
    main()
