"""An E-step of few-shot prompts on a real model, beside transformers' `generate`: the same prompts, draws and dtype.

    python bench/shots.py --model HuggingFaceTB/SmolLM2-135M-Instruct      # or a folder; takes 15 minutes
    python bench/shots.py --model FOLDER --questions 64 --draws 4 --new-tokens 96 --json

Questions of word-problems with worked examples in the prompt, `draws` of each at temperature 0.7, all of `new-tokens`
tokens, so that both do the same work. transformers gets 64 sequences at a time, and samples by its own code.
Then the prefill alone, with the tokens that all prompts share computed once and computed for every prompt, and the
draws in bfloat16 beside float32 where the processor multiplies it in hardware.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from record import facts

import minem
from minem.config import TaskSection
from minem.data.prompts import make_prompts
from minem.data.tasks import load_task
from minem.device import multiplies_bfloat16
from minem.errors import UserError
from minem.generation import sharing
from minem.generation.request import SamplingParams
from minem.model.weights import resolve

BATCH = 64  # sequences at once, for both


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def draw(folder: Path, prompts: list[list[int]], draws: int, new: int, dtype: torch.dtype) -> float:
    generator = minem.Generator(*minem.load(folder, dtype=dtype), slots=BATCH)
    params = SamplingParams(n=draws, temperature=0.7, max_new_tokens=new, min_new_tokens=new)
    return timed(lambda: generator.generate(prompts, params))


def their_draws(folder: Path, prompts: list[list[int]], draws: int, new: int, dtype: torch.dtype) -> float:
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]  # its kernels.py is no package
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    rows = [prompt for prompt in prompts for _ in range(draws)]
    longest = max(map(len, rows))

    def generate() -> None:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in batch])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch])
            length = {"min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
            model.generate(ids, attention_mask=mask, do_sample=True, temperature=0.7, top_k=0, **length)

    return timed(generate)


def prefill(folder: Path, prompts: list[list[int]], shared: bool) -> float:
    before = sharing.SHARED
    sharing.SHARED = before if shared else 1 << 30
    try:
        generator = minem.Generator(*minem.load(folder), slots=BATCH)
        return timed(lambda: generator.generate(prompts, SamplingParams(max_new_tokens=1)))
    finally:
        sharing.SHARED = before


@click.command(help=__doc__)
@click.option("--model", required=True, help="Hugging Face folder or hub id.")
@click.option("--questions", default=64, show_default=True)
@click.option("--draws", default=4, show_default=True)
@click.option("--new-tokens", "new", default=96, show_default=True)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["float32", "bfloat16"]), help="Default: both.")
@click.option("--json", "as_json", is_flag=True, help="Also print everything as one JSON object, the last line.")
def main(model: str, questions: int, draws: int, new: int, dtypes: Sequence[str], as_json: bool) -> None:
    folder = resolve(model)
    _, tokenizer = minem.load(folder, "meta")
    made = make_prompts(tokenizer, TaskSection(name="word-problems", shots="always"), None, [])
    prompts = [made.trained(question) for question in load_task("word-problems", questions).train]
    work = prompts, draws, new
    rows: dict[str, float] = {}

    def show(name: str, seconds: float) -> None:
        rows[name] = seconds
        click.echo(f"{name:<44} {seconds:8.1f} s")

    with torch.no_grad():
        show("prefill, shared tokens once", prefill(folder, prompts, True))
        show("prefill, shared tokens for every prompt", prefill(folder, prompts, False))
        for name in dtypes or (["float32", "bfloat16"] if multiplies_bfloat16() else ["float32"]):
            dtype = getattr(torch, name)
            show(f"draws, minem, {name}", draw(folder, *work, dtype))
            show(f"draws, transformers, {name}", their_draws(folder, *work, dtype))
    tokens = sorted(map(len, prompts))
    click.echo(f"{len(prompts)} prompts of {tokens[0]} to {tokens[-1]} tokens, {draws} draws of {new} tokens each")
    if as_json:
        about = {"model": model, "prompts": tokens, "draws": draws, "new_tokens": new, "seconds": rows}
        click.echo(json.dumps({**facts("transformers"), **about}))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
