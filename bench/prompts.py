"""Which prompt set suits a model: what becomes of its draws under each set, with and without shots.

    python bench/prompts.py --model HuggingFaceTB/SmolLM2-135M-Instruct --task openbookqa
    python bench/prompts.py --model FOLDER --task my/questions.jsonl --sets default,my.toml --limit 32 --json

For each set, each of its hints and the plain prompt, at each temperature (0 is greedy), over the same training
questions: the share of draws that are accepted, that are right if read leniently, unparsed, truncated, and short (no
rationale: fewer than 5 tokens before the answer line); and the median tokens of an accepted rationale. Choose the set
whose hinted draws are accepted and whose rationales are long enough to be one. A line is printed as it is measured.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import click
from record import facts

from minem.config import TaskSection
from minem.console import Progress
from minem.data.prompts import load_prompts, make_prompts
from minem.data.tasks import load_task
from minem.data.verdict import flexible, strict
from minem.em.estep import SHORT, judge, rationale_tokens
from minem.errors import UserError
from minem.generation.request import SamplingParams
from minem.train import make_generator

SHARES = ("accepted", "lenient", "unparsed", "truncated", "short")
COLUMNS = ("set", "shots", "prompt", "temperature", *SHARES, "median_tokens")


@click.command(help=__doc__)
@click.option("--model", required=True, help="Hugging Face folder or hub id.")
@click.option("--task", required=True, help="As for minem train.")
@click.option("--sets", default="default,star,llama", show_default=True, help="Names or FILE.toml, with commas.")
@click.option("--temperatures", default="0,0.7,1", show_default=True, help="With commas.")
@click.option("--limit", default=64, show_default=True, help="Training questions.")
@click.option("--max-new-tokens", default=128, show_default=True)
@click.option("--stop", multiple=True, help="A text that ends an answer, for base models.")
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Also print everything as one JSON object, the last line.")
def main(
    model: str,
    task: str,
    sets: str,
    temperatures: str,
    limit: int,
    max_new_tokens: int,
    stop: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    generator = make_generator(model, device, Progress())
    questions = load_task(task, limit).train
    click.echo("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    rows = []
    for name in sets.split(","):
        words = load_prompts(name)
        for shots in ("none", "proposal") if words.shots else ("none",):
            for hint in (None, *words.hinted):
                section = TaskSection(name=task, prompt=name, shots=shots)
                prompts = make_prompts(generator.tokenizer, section, hint, stop)
                asked = [prompts.drawn(question, hinted=hint is not None) for question in questions]
                for temperature in map(float, temperatures.split(",")):
                    params = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens, stop=stop)
                    drawn = [completion for (completion,) in generator.generate(asked, params)]
                    statuses = [judge(c, q, strict)[1] for c, q in zip(drawn, questions, strict=True)]
                    lengths = [rationale_tokens(c.text, generator.tokenizer) for c in drawn]
                    accepted = [n for n, status in zip(lengths, statuses, strict=True) if status == "accepted"]
                    lenient = [flexible(c.text, q) == q.gold for c, q in zip(drawn, questions, strict=True)]
                    shares = {key: statuses.count(key) / len(drawn) for key in ("accepted", "unparsed", "truncated")}
                    row = {
                        "set": name,
                        "shots": shots != "none",
                        "prompt": hint or "plain",
                        "temperature": temperature,
                        **shares,
                        "lenient": sum(lenient) / len(drawn),
                        "short": sum(n < SHORT for n in lengths) / len(drawn),
                        "median_tokens": statistics.median(accepted) if accepted else None,
                    }
                    rows.append(row)
                    cells = [row[column] for column in COLUMNS]
                    click.echo("| " + " | ".join(f"{c:.2g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    if as_json:
        where = facts("transformers", device=generator.model.device.type)
        about = {"model": model, "task": task, "questions": len(questions), "max_new_tokens": max_new_tokens}
        click.echo(json.dumps({**where, **about, "rows": rows}))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
