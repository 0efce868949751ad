"""Peak memory of `linear_cross_entropy`, forward and backward, on the CPU: it must not grow with the rows.

    python bench/memory.py            # about a minute on two cores; --json for one line

Each size runs in a process of its own. The peak is what the kernel says the process held at most (VmHWM) above what it
held with its inputs, less the gradients that are asked for. The [N, V] logits alone would be 5 GB at N=8192; the bounds
are 1 GB, and 10 % more than at N=2048. Exits with 1 if either is missed.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path

import click
import torch
from record import facts

WIDTH, VOCABULARY, CHUNK_ROWS = 256, 151_936, 512


def resident(field: str) -> int:
    """Bytes that this process holds now (VmRSS) or held at most (VmHWM)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def peak(rows: int) -> int:
    """Bytes held at most above inputs and gradients, for `rows` rows; call it in a fresh process."""
    from minem.kernels import linear_cross_entropy

    generator = torch.Generator().manual_seed(0)
    small = torch.ones(64, 64, requires_grad=True)
    linear_cross_entropy(small, small, torch.zeros(64, dtype=torch.int64))[0].backward()  # loads what loads lazily
    hidden = torch.randn(rows, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).requires_grad_()
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    before = resident("VmRSS")
    loss, _, _ = linear_cross_entropy(hidden, weight, targets, chunk_rows=CHUNK_ROWS)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return resident("VmHWM") - before - (hidden.numel() + weight.numel()) * 4


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on one line.")
def main(as_json: bool) -> None:
    """Measure the peak at 2,048 and at 8,192 rows and hold it against the bounds."""
    peaks = {}
    for rows in (2048, 8192):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[rows] = pool.apply(peak, (rows,))
    ratio = peaks[8192] / peaks[2048]
    holds = peaks[8192] < 1e9 and ratio < 1.1
    if as_json:
        shape = {"width": WIDTH, "vocabulary": VOCABULARY, "chunk_rows": CHUNK_ROWS}
        click.echo(json.dumps({**facts(), **shape, "peak_bytes": peaks, "holds": holds}))
    else:
        for rows, size in peaks.items():
            click.echo(f"N={rows}: {size / 1e6:.0f} MB above inputs and gradients")
        click.echo(f"bounds {'hold' if holds else 'MISSED'}: under 1000 MB, and N=8192 over N=2048 {ratio:.3f} < 1.1")
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
