"""One epoch of an M-step beside transformers with padding and TRL's SFTTrainer: tokens/s, MFU and peak memory.

    python bench/train.py                              # on the CPU: a model of 26 M parameters, minutes on two cores
    python bench/train.py --json                       # the same as one line of JSON, the last
    python bench/train.py --shape qwen2.5-3b --json    # on a GPU: the shapes of real models, 16,384 tokens packed
    python bench/train.py --profile                    # and where the time of one of minem's steps goes

All start from the same random weights and train on the same rows: prompts as long as those of ARC-Challenge, answers of
log-normal length, tokens drawn unevenly so that there is something to learn. minem and transformers do the same
optimizer steps, whose losses must agree, or this exits with 1. transformers gets the usual loop: rows padded on the
right to the longest of their micro-batch, labels of -100 where nothing is supervised, its own loss, torch's fused
AdamW; on a GPU float32 weights under bfloat16 autocast, as minem's float32 masters are. Its micro-batches hold as many
tokens as minem's, padding included, in the order of the shuffle or sorted by length inside each step; where that does
not fit on a GPU, half as many, and half again. TRL packs before it forms steps, so its steps are others; its loss at
the end, over all rows, is shown and not compared.

Only real tokens count in tokens/s. FLOPs are 6 x (body parameters x all tokens + head parameters x supervised ones),
without attention and recomputation. Each contestant runs in a process of its own: its memory is the peak during
training (on a GPU what PyTorch's allocator gave out, weights included; on the CPU anonymous memory, sampled, above what
the process held when all was imported). One step at a learning rate of 0 comes first and is not timed.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import rich.table
import torch
from contestants import CONTESTANTS, DTYPES, Job, Minem, Padded, change, write_model
from generate import failed, synchronize
from memory import resident
from record import ceilings, facts, flops, peak_flops
from resources import SHAPES, Shape
from rich.console import Console

from minem.config import MStepSection
from minem.em.packing import Example

ALL_SHAPES = {
    "tiny": Shape("small", 64, 4, 2, 16, 128, 512),  # for the tests
    "small": Shape("small", 512, 8, 4, 64, 1408, 16_384),
    **{shape.name: shape for shape in SHAPES},
}
AGREE = {"cuda": 2e-2, "cpu": 1e-4}  # how far apart the losses of a step may be, relatively


@contextmanager
def peak_memory(device: str, before: int) -> Iterator[list[int]]:
    """The most bytes held while open: on a GPU by PyTorch's allocator, else anonymous ones less those of `before`."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield (peaks := [])
        peaks.append(torch.cuda.max_memory_allocated())
        return
    done, peaks = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            peaks[0] = max(peaks[0], resident("RssAnon") - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()


def measure(name: str, job: Job) -> dict[str, Any]:
    """Train one epoch; called in a fresh process."""
    kind, packages = CONTESTANTS[name]
    if packages:
        import transformers
        from transformers import LlamaForCausalLM, Qwen2ForCausalLM  # noqa: F401 (loads what is loaded lazily)

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    examples = job.examples()
    before = resident("RssAnon")
    contestant = kind(job)
    first = [examples[i] for i in job.steps(examples)[0]]
    contestant.epoch(first, 0.0)  # compiles what is compiled, and leaves the weights as they are
    with peak_memory(job.device, before) as memory:
        synchronize()
        start = time.perf_counter()
        result = contestant.epoch(examples, job.settings.lr)
        synchronize()
        seconds = time.perf_counter() - start
    result |= {"seconds": seconds, "peak_bytes": memory[0], "loss": contestant.loss(examples)}
    if job.profile and name == "minem":
        result["profile"] = profiled(contestant, first, job.device)
    return result


def profiled(contestant: Minem | Padded, examples: list[Example], device: str) -> str:
    """A table of one optimizer step, the most expensive operations first."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as seen:
        contestant.epoch(examples, 0.0)
        synchronize()
    return seen.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=25, max_name_column_width=70)


def in_a_process(name: str, job: Job) -> dict[str, Any]:
    """What `measure` returns, or {"failed": why}; with half the tokens a micro-batch if memory does not suffice."""
    tokens = job.settings.pack_tokens
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(measure, name, job).result() | {"pack_tokens": tokens}
    except Exception as error:  # a contestant that cannot run here must not end the others' run
        if name == "minem":
            raise
        if "OutOfMemory" not in type(error).__name__ or tokens <= 2048:
            return {"failed": failed(error)}
    return in_a_process(name, replace(job, settings=change(job.settings, pack_tokens=tokens // 2)))


def compare(job: Job, names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Every contestant's median time and largest peak; they take turns, so that a busy machine slows them alike."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names:
            if any("failed" in result for result in found[name]):
                continue
            found[name].append(in_a_process(name, replace(job, profile=job.profile and turn == 0)))
            shown = {key: value for key, value in found[name][-1].items() if key not in ("profile", "losses")}
            print(f"{name}: {json.dumps(shown)}", file=sys.stderr, flush=True)  # a run that is cut off has lost nothing
    examples = job.examples()
    tokens, supervised = sum(map(len, examples)), sum(len(e.token_ids) for e in examples)
    work, peak = flops(job.config, tokens, supervised), peak_flops(torch.device(job.device))
    rows = {}
    for name, results in found.items():
        rows[name] = results[-1]
        if "failed" in results[-1]:
            continue
        seconds = statistics.median(result["seconds"] for result in results)
        rows[name] = results[0] | {
            "seconds": seconds,
            "all_seconds": [result["seconds"] for result in results],
            "peak_bytes": max(result["peak_bytes"] for result in results),
            "tokens_per_second": tokens / seconds,
            "flops_per_second": work / seconds,
            "mfu": None if peak is None else work / seconds / peak,
        }
    lengths = sorted(len(e) for e in examples)
    count = {"count": job.rows, "tokens": tokens, "supervised": supervised, "shortest": lengths[0]}
    count |= {"median": lengths[len(lengths) // 2], "longest": lengths[-1]}
    return {"rows": count, "contestants": rows, "apart": apart(rows)}


def apart(rows: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference of a step's loss, and of the loss at the end, from minem's."""
    ours = rows["minem"]
    differences = {}
    for name, row in rows.items():
        if name.startswith("transformers") and "failed" not in row:
            pairs = zip([*ours["losses"], ours["loss"]], [*row["losses"], row["loss"]], strict=True)
            differences[name] = max(abs(a - b) / b for a, b in pairs)
    return differences


def table(result: dict[str, Any], rate: float) -> rich.table.Table:
    shown = rich.table.Table(
        "contestant", "seconds", "tokens/s", "TFLOP/s", "MFU", "of products here", "peak MB", "loss", "minem is", "how"
    )
    ours = result["contestants"]["minem"]
    for name, row in result["contestants"].items():
        if "failed" in row:
            shown.add_row(name, "failed", *[""] * 7, row["failed"])
            continue
        ratio = f"{row['seconds'] / ours['seconds']:.2f} x as fast, {ours['peak_bytes'] / row['peak_bytes']:.0%} memory"
        losses = f"{row['losses'][0]:.4f} to {row['losses'][-1]:.4f}, {row['loss']:.5f} at the end"
        speed = f"{row['seconds']:.4g}", f"{row['tokens_per_second']:,.0f}", f"{row['flops_per_second'] / 1e12:.3g}"
        share = "" if row["mfu"] is None else f"{row['mfu']:.1%}", f"{row['flops_per_second'] / rate:.0%}"
        how = f"{row['micro_batches']}, {row['pack_tokens']:,} tokens each"
        peak = f"{row['peak_bytes'] / 1e6:,.0f}"
        shown.add_row(name, *speed, *share, peak, losses, "" if name == "minem" else ratio, how)
    return shown


@click.command()
@click.option("--shape", "names", multiple=True, type=click.Choice(list(ALL_SHAPES)), help="All; on a CPU, small.")
@click.option("--rows", type=click.IntRange(min=2), help="Examples; 576 on a GPU, 64 on the CPU.")
@click.option("--pack-tokens", type=click.IntRange(min=1), help="Of a micro-batch; 16,384 on a GPU, 8,192 on the CPU.")
@click.option("--repeats", type=click.IntRange(min=1), help="Epochs of each, from the same start; 1 on a GPU, else 3.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="Run the others beside, if installed.")
@click.option("--checkpointing", type=click.Choice(["auto", "off", "full"]), default="auto", show_default=True)
@click.option("--profile", is_flag=True, help="Also print where the time of one of minem's steps goes.")
@click.option("--json", "as_json", is_flag=True, help="After the tables, one JSON object on one line.")
def main(
    names: tuple[str, ...],
    rows: int | None,
    pack_tokens: int | None,
    repeats: int | None,
    peers: bool,
    checkpointing: Any,
    profile: bool,
    as_json: bool,
) -> None:
    """Time one epoch of an M-step beside those of others."""
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    pack_tokens = pack_tokens or (16_384 if gpu else 8192)
    # On a GPU a step has two full micro-batches, on the CPU one.
    work = {"lr": 1e-5, "batch_size": 72} if gpu else {"lr": 1e-4, "batch_size": 16}
    settings = MStepSection(**work, pack_tokens=pack_tokens, checkpointing=checkpointing)
    console = Console(highlight=False, width=230, stderr=as_json)
    rate = ceilings(device, DTYPES[device])[1]
    about = {
        "dtype": str(DTYPES[device]).removeprefix("torch."),
        **facts("transformers", "trl", "liger-kernel", "triton", device=device),
    }
    for name, fact in about.items():
        console.print(f"{name}: {fact}")
    console.print(f"matrix products measured here: {rate / 1e12:,.2f} TFLOP/s")
    contestants = [name for name, (_, needed) in CONTESTANTS.items() if all(map(find_spec, needed))]
    contestants = [name for name in contestants if gpu or "Liger" not in name]  # its kernels need a GPU
    results, agree = {}, True
    for name in names or ([shape.name for shape in SHAPES] if gpu else ["small"]):
        with tempfile.TemporaryDirectory() as folder:
            write_model(ALL_SHAPES[name], Path(folder), device, DTYPES[device])
            if gpu:
                torch.cuda.empty_cache()
            job = Job(folder, device, rows or (576 if gpu else 64), settings, profile)
            result = results[name] = compare(
                job, contestants if peers else contestants[:1], repeats or (1 if gpu else 3)
            )
        console.print(
            "\n{}: {count} rows of {shortest} to {longest} tokens, median {median}".format(name, **result["rows"])
        )
        console.print("{tokens:,} tokens in all, {supervised:,} of them supervised".format(**result["rows"]))
        console.print(table(result, rate))
        for peer, difference in result["apart"].items():
            agree &= difference <= AGREE[device]
            console.print(f"losses of {peer}: within {difference:.1e} of minem's (allowed: {AGREE[device]:.0e})")
        if listing := result["contestants"]["minem"].pop("profile", None):
            console.print(f"\nOne step of minem:\n{listing}")
    if as_json:
        print(json.dumps({**about, "operations_per_s": rate, "settings": settings.model_dump(), "shapes": results}))
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
