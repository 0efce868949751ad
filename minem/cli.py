"""The command line: flags in, one of the other modules at work, results out.

    minem --help

Results go to stdout (with --json as one object on one line, the last), progress and warnings to stderr; minem.errors
has the exit codes. Nothing heavy is imported before a command runs, so that help is there at once.
"""

import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import click

import minem
from minem.commands import Commands
from minem.errors import GuardError, UserError
from minem.text import clean


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(minem.__version__, prog_name="minem")
def main() -> None:
    """Teach a language model to reason by expectation maximization.

    `minem train` with no arguments trains the embedded toy in minutes and shows its accuracy rise.
    """


_file_option = click.Argument(["config_file"], metavar="[CONFIG.toml]", required=False, type=click.Path(path_type=Path))
_set_option = click.Option(["--set", "overrides"], multiple=True, metavar="A.B=V", help="Set any key of the config.")
_device_option = click.option(
    "--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute."
)
_model_option = click.option("--model", default="toy", show_default=True, help="Hugging Face folder, hub id, or toy.")
# Each of these is short for the key of the config that its help names in brackets.
_config_options = [
    _file_option,
    click.Option(["--model"], help="Hugging Face folder, hub id, or toy (the default).  [model.id]"),
    click.Option(
        ["--task"],
        help="toy, arc-challenge, arc-easy, openbookqa, mmlu, gsm8k, hub:NAME, a folder or file.  [task.name]",
    ),
    click.Option(["--limit"], type=int, help="At most N questions of each split.  [task.limit]"),
    click.Option(["--prompt"], help="A built-in prompt set or your own FILE.toml.  [task.prompt]"),
    click.Option(["--verdict"], help="Your own answer check, module:function.  [task.verdict]"),
    click.Option(["--iterations"], type=int, help="EM iterations.  [run.iterations]"),
    click.Option(["--out"], help="The run's directory.  [run.out]"),
    click.Option(["--device"], help="auto, cpu or cuda.  [run.device]"),
    _set_option,
    click.Option(["--overwrite"], is_flag=True, help="Start from scratch if --out holds a run already."),
    click.Option(["--json", "as_json"], is_flag=True, help="Print the result as one JSON object on one line."),
]
_sampler_options = [
    click.Option(["--sampler"], help="rsm, star, pps or your own, module:Class.  [sampler.name]"),
    click.Option(["--budget"], type=int, help="Most attempts per question and iteration.  [sampler.budget]"),
    click.Option(["--seed"], type=int, help="Decides every random choice.  [run.seed]"),
    click.Option(["--gpus"], type=click.IntRange(min=1), default=1, help="Use N GPUs, one process on each."),
]
_track_option = click.option(
    "--track", type=click.Choice(["wandb", "trackio"]), help="Also send the metrics to one of these as they come."
)


def _config(flags: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """The config, and where its values were written."""
    from minem.config import FLAGS, load_config, origins

    given = {key: flags.get(flag.removeprefix("--")) for key, flag in FLAGS.items()}
    written = flags["config_file"], flags["overrides"], given
    return load_config(*written), origins(*written)


@contextmanager
def _session(flags: dict[str, Any], config: Any, origins: dict[str, str]) -> Iterator[Any]:
    """What a run needs beside its config; for --gpus, this process only starts the others."""
    from minem.console import Progress
    from minem.parallel.launch import check_gpus, joined, launch
    from minem.parallel.signals import Stop
    from minem.runs.stages import Session

    gpus = flags.get("gpus", 1)
    if gpus > 1 and "LOCAL_RANK" not in os.environ:
        check_gpus(gpus, config.run.device)
        raise click.exceptions.Exit(launch(gpus, ["-m", "minem", *sys.argv[1:]]))
    stop = Stop()
    with stop.listening(), joined(config.run.device) as ranks:
        progress = Progress() if ranks.first else Progress(io.StringIO(), interval=math.inf)
        tracker = import_module(flags["track"]) if flags.get("track") and ranks.first else None
        yield Session(progress, ranks, stop, sys.argv, flags["overwrite"], tracker, origins)


@main.command(params=[*_config_options, *_sampler_options])
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="The M-step alone, on the accepted rows of a samples.jsonl made anywhere.",
)
@_track_option
@click.option("--dry-run", is_flag=True, help="Only print what the run would need: memory, samples, steps, disk.")
def train(samples: Path | None, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Run the EM loop, or resume it after its last finished stage.

    The result is a run directory with the samples, the model and the accuracy of every iteration.
    """
    config, origins = _config(flags)
    if dry_run:
        if samples is not None:
            raise UserError("--dry-run plans a whole run; give either it or --samples")
        _dry_run(config, flags["gpus"], as_json)
        return
    with _session(flags, config, origins) as session:
        from minem import train as whole
        from minem.report import tables
        from minem.report.reader import checked

        if samples is not None:
            result, show = whole.train_on_samples(config, samples, session), tables.mstep_line
        else:
            result, show = whole.train(config, session), tables.train_table
        if session.ranks.first:
            with checked(Path(result["run"])):
                _print(result, as_json, lambda: show(result))


def _dry_run(config: Any, gpus: int, as_json: bool) -> None:
    from minem.console import table
    from minem.parallel.launch import check_gpus
    from minem.planning import dryrun
    from minem.train import build, longest_prompt

    check_gpus(gpus, config.run.device)
    experiment = build(config, weights=False)
    result = dryrun.dry_run(config, experiment, longest_prompt(config, experiment), gpus)

    def show() -> None:
        for columns, rows in dryrun.tables(result):
            table(columns, rows)
        click.echo(result["advice"] or "it fits: memory and disk are enough for all of this")

    _print(result, as_json, show)


@main.command(params=[*_config_options, *_sampler_options])
@click.option("--iteration", type=click.IntRange(min=1), default=1, show_default=True, help="Which E-step.")
def sample(iteration: int, as_json: bool, **flags: Any) -> None:
    """Run the E-step of one iteration alone: write samples.jsonl and accepted.jsonl.

    `minem train` with the same flags continues from there.
    """
    config, origins = _config(flags)
    with _session(flags, config, origins) as session:
        from minem import train as whole
        from minem.report import tables

        result = whole.sample(config, iteration, session)
        if session.ranks.first:
            _print(result, as_json, lambda: tables.sample_line(result))


@main.command("config", params=[_file_option, _set_option])
def show_config(config_file: Path | None, overrides: tuple[str, ...]) -> None:
    """Print every key of the config with its value and its meaning, as TOML: the reference."""
    from minem.config import load_config, reference

    click.echo(reference(load_config(config_file, overrides)))


@main.command(params=[*_config_options])
@click.option("--models", metavar="M,M", help="Several models instead of --model, with commas.  [model.id]")
@click.option("--samplers", default="rsm:8,star:2,pps:1", show_default=True, help="NAME:BUDGET with commas.")
@click.option("--arm", multiple=True, metavar="NAME:A.B=V,...", help="One more row, with these keys of the config.")
@click.option("--seeds", default="0,1,2,3,4", show_default=True, help="With commas. Claims need five or more.")
@click.option(
    "--match", type=click.Choice(["none", "kept", "cost"]), default="none", help="Equal examples, or tokens: see above."
)
@_track_option
def compare(samplers: str, seeds: str, match: Any, as_json: bool, **flags: Any) -> None:
    """Compare samplers over several seeds, each a run of its own, and print what they reach and cost.

    --task may name several tasks, with commas. The same command continues a comparison that was stopped.
    A folder in place of CONFIG.toml holds runs made before: the tables about them are printed, and nothing runs.

    --arm may be given several times. Each is a row beside the samplers, with keys of its own: the control experiment
    is --arm control:sampler.name=rsm,sampler.filter=none. What an arm does not set is the config's.

    With --match kept, all samplers of a seed train on equally many accepted rationales in each iteration, drawn in
    a random order that is the same for all. With --match cost they train on what they accept at the first questions
    in that order, for as many generated tokens as the thriftiest sampler spends.
    """
    if flags["config_file"] is not None and flags["config_file"].is_dir():
        _compare_folder(flags["config_file"], as_json)
        return
    if flags["models"] is not None and flags["model"]:
        raise UserError("give either --model or --models")
    config, origins = _config({**flags, "model": flags["model"] if flags["models"] is None else flags["models"]})
    from minem.compare import experiment as comparison
    from minem.report import tables

    for key, flag in comparison.OWN_KEYS.items():
        if origins.get(key) == "--set":
            raise UserError(f"--set {key}: compare takes it from {flag}; leave the --set out")
    plan = comparison.Plan.parse(config, samplers, seeds, match, flags["arm"])
    with _session(flags, config, origins) as session:
        result = comparison.compare(config, plan, session)
    _print(result, as_json, lambda: tables.compare_tables(result))
    if result["stopped"]:
        names, (reason, *_) = ", ".join(result["stopped"]), result["stopped"].values()
        raise GuardError(f"a guard stopped {names} (the first: {reason}); the results are those of the other runs")


def _compare_folder(folder: Path, as_json: bool) -> None:
    from minem.compare.results import read_folder
    from minem.report import tables

    context = click.get_current_context()
    for name in context.params.keys() - {"config_file", "as_json"}:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            flag = name.replace("_", "-").replace("overrides", "set")
            raise UserError(f"--{flag} says how to run, but the runs in {folder} were made before; leave it out")
    result = read_folder(folder)
    _print(result, as_json, lambda: tables.compare_tables(result))


@main.command("eval")
@click.argument("run", required=False)
@_model_option
@click.option("--task", default="toy", show_default=True, help="As for train.")
@click.option("--split", default="test", show_default=True, type=click.Choice(["train", "validation", "test"]))
@click.option("--limit", type=click.IntRange(min=1), help="At most N questions.")
@click.option(
    "--columns", multiple=True, metavar="NAME=COLUMN", help="question=problem, options=a,b or ignore=x; repeats."
)
@click.option("--prompt", help="A built-in prompt set or your own FILE.toml. By default the task's.")
@click.option(
    "--shots",
    type=click.Choice(["none", "always"]),
    default="none",
    show_default=True,
    help="always: the prompt set's worked examples.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="A text that ends an answer, in bash $'\\n\\n'.")
@click.option("--verdict", help="Your own answer check, module:function.")
@click.option(
    "--samples", type=click.IntRange(0, 1000), default=0, show_default=True, help="Draws per question at temperature 1."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="By default 512, or what the model has room for.")
@click.option("--seed", type=int, default=0, show_default=True)
@_device_option
@click.option("--out", type=click.Path(path_type=Path), help="By default evals/MODEL.TASK.SPLIT.sSEED.")
@click.option("--overwrite", is_flag=True, help="Draw again what --out holds already.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on one line.")
def evaluate(run: str | None, as_json: bool, **flags: Any) -> None:
    """Measure accuracy: greedy with its 95 % interval, and of draws at temperature 1 the mean, pass@k and the vote.

    RUN, a run's directory, stands for its newest model, in place of --model.

    Answers are kept as they finish in --out: the same command continues from them, also with more --samples.
    """
    from minem import train as whole
    from minem.report import tables

    result = whole.evaluate(**flags | ({"model": run} if run else {}))
    _print(result, as_json, lambda: tables.eval_table(result))


@main.command()
@_model_option
@click.option("--prompt", help="One prompt.")
@click.option("--prompts", type=click.Path(path_type=Path), help='Many: JSON lines, each {"prompt": ...}.')
@click.option("--chat", is_flag=True, help="Send the prompt through the model's chat template.")
@click.option("--n", type=int, default=1, show_default=True, help="Completions per prompt.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="0 is off.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="1 is off.")
@click.option("--min-p", type=float, default=0.0, show_default=True, help="0 is off.")
@click.option("--max-new-tokens", type=int, default=256, show_default=True)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option("--seed", type=int, default=0, show_default=True)
@_device_option
@click.option("--json", "as_json", is_flag=True, help="Print all with token ids and log-probabilities, on one line.")
def generate(
    model: str, prompt: str | None, prompts: Path | None, chat: bool, device: str, as_json: bool, **sampling: Any
) -> None:
    """Complete prompts."""
    if (prompt is None) == (prompts is None):
        raise UserError("give either --prompt TEXT or --prompts FILE.jsonl")
    texts = _read_prompts(prompts) if prompts is not None else [prompt or ""]
    from minem.console import Progress
    from minem.generation.request import SamplingParams
    from minem.report import tables
    from minem.train import make_generator

    try:
        params = SamplingParams(**sampling)
    except UserError as error:  # its message begins with "top_p = ..."
        name, _, rest = str(error).partition(" ")
        raise UserError(f"--{name.replace('_', '-')} {rest}") from error
    generator = make_generator(model, device, Progress())
    asked: list[Any] = texts
    if chat:
        asked = [generator.tokenizer.chat([{"role": "user", "content": text}]) for text in texts]
    answers = generator.generate(asked, params)
    fields = ("token_ids", "text", "logprobs", "finish_reason")
    result = [
        {"prompt": text, "completions": [{field: getattr(c, field) for field in fields} for c in completions]}
        for text, completions in zip(texts, answers, strict=True)
    ]
    _print({"model": model, "results": result}, as_json, lambda: tables.completions(result))


def _read_prompts(path: Path) -> list[str]:
    from minem.files import read_rows

    texts = []
    for number, row in enumerate(read_rows(path), start=1):
        if not isinstance(row.get("prompt"), str) or not row["prompt"]:
            raise UserError(f'{path}, row {number}: "prompt" must be a text of at least one character')
        texts.append(row["prompt"])
    if not texts:
        raise UserError(f'{path} has no rows; each must be like {{"prompt": "..."}}')
    return texts


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--iteration", type=click.IntRange(min=1), help="Of this E-step alone.")
@click.option("--status", type=click.Choice(["accepted", "wrong", "unparsed", "truncated"]), help="With this verdict.")
@click.option("--question", metavar="ID", help="Of this question.")
@click.option("-n", "n", type=click.IntRange(min=0), default=10, show_default=True, help="Show at most N samples.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as one JSON object on one line.")
def show(run: Path, as_json: bool, **which: Any) -> None:
    """Show what the model wrote in the E-steps of a run, finished or not."""
    from minem.report import show as shown

    result, lines = shown.show(run, **which)
    _print(result, as_json, lambda: click.echo("\n".join(lines)))


@main.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), default="report.html", show_default=True)
def report(runs: tuple[Path, ...], out: Path) -> None:
    """Write one HTML page about one run or many, finished or not: charts, flips, samples, how to repeat them.

    RUN may also be a folder of runs, such as a comparison.

    Runs that differ in nothing but their seed are shown as their mean and spread.
    """
    from minem.report.page import check_place, write_report
    from minem.report.reader import runs_in

    check_place(out)
    write_report(list(runs_in(runs)), out)
    click.echo(clean(str(out)))


@main.command()
@_device_option
@click.option("--json", "as_json", is_flag=True, help="Print what was found as one JSON object on one line.")
def doctor(device: str, as_json: bool) -> None:
    """Print what this machine has, what each part will run on, and what to do about the rest.

    A self-test of some seconds compares the generator with the trainer; exit code 4 if they disagree.
    """
    from minem.planning import doctor as doctors

    found = doctors.examine(device)
    _print(found, as_json, lambda: click.echo("\n".join(map(clean, doctors.lines(found)))))
    if not found["passed"]:
        raise GuardError("the self-test failed: the generator does not agree with the trainer")


def _print(result: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        click.echo(json.dumps(result, allow_nan=False))
    else:
        show()
