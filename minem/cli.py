"""The command line: flags in, one of the other modules at work, results out.

    minem --help

Results go to stdout (with --json as one object on one line, the last), progress and warnings to stderr. Exit codes:
0 done, 2 bad input (one sentence), 3 stopped but resumable, 4 stopped by a guard. Nothing heavy is imported before a
command runs, so that help is there at once.
"""

from __future__ import annotations

import difflib
import io
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

import minem
from minem.errors import GuardError, MinemError, UserError
from minem.report import tables
from minem.report.tables import say
from minem.text import clean, sentence


class _Group(click.Group):
    """Turns minem's own errors into one sentence and an exit code, and names the nearest command for a misspelt one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(self.list_commands(ctx))}"
            raise click.UsageError(f"there is no command {args[0]!r}; {advice}") from error

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:  # the help
            return super().parse_args(ctx, args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            _refuse(ctx, error)

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that is not UTF-8 gets escapes and no traceback
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with _stoppable():
                return super().invoke(ctx)
        except click.UsageError as error:
            _refuse(ctx, error)
        except MinemError as error:
            click.echo(f"minem: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            resumable = ctx.invoked_subcommand in ("train", "sample", "eval", "compare")
            advice = "; give the same command again to go on from there" if resumable else ""
            click.echo(f"minem: stopped{advice}", err=True)
            ctx.exit(3)


@contextmanager
def _stoppable() -> Iterator[None]:
    """While open, SIGTERM and SIGUSR1 stop a command as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # who alone may say so
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse(ctx: click.Context, error: click.UsageError) -> NoReturn:
    """click's complaint about a flag or a value in one sentence, with the nearest valid name where there is one."""
    ctx = error.ctx or ctx
    said, found, names = error.format_message().rstrip("."), "", []
    if isinstance(error, click.NoSuchOption):
        said, found = f"there is no flag {error.option_name}", error.option_name
        names = [name for param in ctx.command.get_params(ctx) for name in param.opts if name.startswith("--")]
    elif isinstance(error, click.BadParameter) and error.param and isinstance(error.param.type, click.Choice):
        value = re.search(r": '(.*)' is not one of", said, re.DOTALL)
        found, names = value[1] if value else "", list(map(str, error.param.type.choices))
    near = difflib.get_close_matches(found, names, n=1)
    advice = f"did you mean {near[0]}?" if near else f"see {ctx.command_path} --help"
    click.echo(f"minem: {sentence(f'{said}; {advice}')}", err=True)
    ctx.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(minem.__version__, prog_name="minem")
def main() -> None:
    """Teach a language model to reason by expectation maximization.

    `minem train` with no arguments trains the embedded toy in minutes and shows its accuracy rise.
    """


def _config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of train, sample and compare; all but the first and the last two are short for a key of the config."""
    for option in reversed(
        [
            click.argument("config_file", metavar="[CONFIG.toml]", required=False, type=click.Path(path_type=Path)),
            click.option("--model", help="Hugging Face folder, hub id, or toy (the default).  [model.id]"),
            click.option(
                "--task", help="toy, arc-challenge, arc-easy, openbookqa, mmlu, gsm8k, a folder or file.  [task.name]"
            ),
            click.option("--limit", type=int, help="At most N questions of each split.  [task.limit]"),
            click.option("--verdict", help="Your own answer check, module:function.  [task.verdict]"),
            click.option("--iterations", type=int, help="EM iterations.  [run.iterations]"),
            click.option("--out", help="The run's directory.  [run.out]"),
            click.option("--device", help="auto, cpu or cuda.  [run.device]"),
            click.option("--set", "overrides", multiple=True, metavar="A.B=V", help="Set any key of the config."),
            click.option("--overwrite", is_flag=True, help="Start anew where --out holds a run already."),
            click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on one line."),
        ]
    ):
        command = option(command)
    return command


def _sampler_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Flags of a single run, short for a key of the config like those of `_config_options`."""
    for option in reversed(
        [
            click.option("--sampler", help="rsm, star, pps or your own, module:Class.  [sampler.name]"),
            click.option("--budget", type=int, help="Most attempts per question and iteration.  [sampler.budget]"),
            click.option("--seed", type=int, help="Decides every random choice.  [run.seed]"),
            click.option("--gpus", type=click.IntRange(min=1), default=1, help="Use so many GPUs, a process on each."),
        ]
    ):
        command = option(command)
    return command


_track_option = click.option(
    "--track", type=click.Choice(["wandb", "trackio"]), help="Also send the metrics to one of these as they come."
)


def _config(config_file: Path | None, overrides: tuple[str, ...], flags: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """The config, and where its values were written."""
    from minem.config import FLAGS, load_config, origins

    given = {key: flags.get(flag.removeprefix("--")) for key, flag in FLAGS.items()}
    return load_config(config_file, overrides, given), origins(config_file, overrides, given)


@contextmanager
def _running(config: Any, gpus: int) -> Iterator[tuple[Any, Any, Any]]:
    """(ranks, stop, progress) of a run in this process; for --gpus, this one only starts the others."""
    from minem.console import Progress
    from minem.parallel.ranks import joined, launch
    from minem.parallel.signals import Stop

    if gpus > 1 and "WORLD_SIZE" not in os.environ:
        _check_gpus(gpus, config.run.device)
        raise click.exceptions.Exit(launch(gpus, _without_gpus(sys.argv[1:])))
    stop = Stop()
    with stop.listening(), joined(config.run.device) as ranks:
        yield ranks, stop, Progress() if ranks.first else Progress(io.StringIO(), interval=math.inf)


def _check_gpus(gpus: int, device: str) -> None:
    if gpus == 1:
        return
    import torch

    there = torch.cuda.device_count()
    if device != "cpu" and gpus > there:
        advice = "--device cpu runs them as processes on the CPU" if there == 0 else f"give --gpus {there} or fewer"
        raise UserError(f"--gpus {gpus}, but torch sees {there} CUDA device(s) here; {advice}")


def _without_gpus(arguments: Sequence[str]) -> list[str]:
    """The command line for each of the processes."""
    at = [i for i, argument in enumerate(arguments) if argument == "--gpus"]
    left = {i + after for i in at for after in (0, 1)}
    return [a for i, a in enumerate(arguments) if i not in left and not a.startswith("--gpus=")]


@main.command()
@_config_options
@_sampler_options
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="The M-step alone, on the accepted rows of a samples.jsonl made anywhere.",
)
@_track_option
@click.option("--dry-run", is_flag=True, help="Only say what the run would need: memory, samples, steps, disk.")
def train(
    config_file: Path | None,
    overrides: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
    samples: Path | None,
    track: str | None,
    gpus: int,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Run the EM loop, or continue it where it stopped.

    The result is a run directory with the samples, the model and the accuracy of every iteration.
    """
    config, origins = _config(config_file, overrides, flags)
    if dry_run:
        if samples is not None:
            raise UserError("--dry-run plans a whole run; give either it or --samples")
        _check_gpus(gpus, config.run.device)
        _dry_run(config, gpus, as_json)
        return
    with _running(config, gpus) as (ranks, stop, progress):
        from minem import train as whole
        from minem.runs.tracking import load_tracker

        tracker = load_tracker(track if ranks.first else None)
        if samples is not None:
            result = whole.train_on_samples(
                config, samples, progress, sys.argv, overwrite, tracker, ranks=ranks, stop=stop, origins=origins
            )
        else:
            result = whole.train(
                config, progress, sys.argv, overwrite, tracker, ranks=ranks, stop=stop, origins=origins
            )
        if ranks.first:
            show = tables.train_table if samples is None else tables.mstep_line
            _print(result, as_json, lambda: show(result))


def _dry_run(config: Any, gpus: int, as_json: bool) -> None:
    from minem.console import Progress, table
    from minem.em.loop import Experiment
    from minem.planning import dryrun

    experiment = Experiment(config, Progress(), weights=False)
    result = dryrun.dry_run(config, experiment, experiment.longest, gpus)

    def show() -> None:
        for columns, rows in dryrun.tables(result):
            table(columns, rows, file=sys.stdout)
        click.echo(result["advice"] or "it fits: memory and disk are enough for all of this")

    _print(result, as_json, show)


@main.command()
@_config_options
@_sampler_options
@click.option("--iteration", type=click.IntRange(min=1), default=1, show_default=True, help="Which E-step.")
def sample(
    config_file: Path | None,
    overrides: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
    iteration: int,
    gpus: int,
    **flags: Any,
) -> None:
    """Run the E-step of one iteration alone: write samples.jsonl and accepted.jsonl.

    `minem train` with the same flags goes on from there.
    """
    config, origins = _config(config_file, overrides, flags)
    with _running(config, gpus) as (ranks, stop, progress):
        from minem import train as whole
        from minem.console import percent

        result = whole.sample(config, iteration, progress, sys.argv, overwrite, ranks=ranks, stop=stop, origins=origins)
        solved, questions = result["solved"], result["questions"]
        text = f"{solved}/{questions} questions solved ({percent(solved / questions)}), rows in {result['samples']}"
        if ranks.first:
            _print(result, as_json, lambda: say(text))


@main.command()
@_config_options
@click.option("--samplers", default="rsm:8,star:2,pps:1", show_default=True, help="NAME:BUDGET with commas.")
@click.option("--seeds", default="0,1,2,3,4", show_default=True, help="With commas. Claims need five or more.")
@click.option(
    "--match",
    type=click.Choice(["none", "kept", "cost"]),
    default="none",
    show_default=True,
    help="kept: in each iteration all samplers of a seed train on equally many examples. "
    "cost: on what they find with equally many generated tokens.",
)
@_track_option
def compare(
    config_file: Path | None,
    overrides: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
    samplers: str,
    seeds: str,
    match: Any,
    track: str | None,
    **flags: Any,
) -> None:
    """Compare samplers over several seeds, each a run of its own, and print what they reach and cost.

    --task may name several tasks, with commas. The same command goes on where it was stopped.

    --match kept takes, of each sampler's accepted rationales, the first n in an order that is random but the same for
    all samplers, n being the fewest that one of them has: as much data for all, and as many optimizer steps. --match
    cost takes the questions, in that order, whose attempts fit into the tokens of the thriftiest sampler, and the
    rationales accepted among them: what each sampler finds for the same number of generated tokens.
    """
    for key, flag in {"sampler.name": "--samplers", "sampler.budget": "--samplers", "run.seed": "--seeds"}.items():
        if any(override.partition("=")[0].strip() == key for override in overrides):
            raise UserError(f"--set {key}: compare takes it from {flag}; leave the --set out")
    config, origins = _config(config_file, overrides, flags)
    from minem.compare import experiment as comparison
    from minem.console import Progress
    from minem.parallel.signals import Stop
    from minem.runs.tracking import load_tracker

    tracker = load_tracker(track)
    plan = comparison.Plan.parse(config.task.name, samplers, seeds, match)
    stop = Stop()
    with stop.listening():
        opening = {"command": sys.argv, "tracker": tracker, "origins": origins}
        result = comparison.compare(config, plan, Progress(), stop, overwrite, **opening)
    _print(result, as_json, lambda: tables.compare_tables(result))
    if result["stopped"]:
        names, (reason, *_) = ", ".join(result["stopped"]), result["stopped"].values()
        raise GuardError(f"a guard stopped {names} (the first: {reason}); the results are those of the other runs")


@main.command("eval")
@click.option("--model", default="toy", show_default=True, help="Hugging Face folder, hub id, or toy.")
@click.option("--task", default="toy", show_default=True, help="As for train.")
@click.option("--split", default="test", show_default=True, type=click.Choice(["train", "validation", "test"]))
@click.option("--limit", type=int, help="At most N questions.")
@click.option("--verdict", help="Your own answer check, module:function.")
@click.option(
    "--samples", type=click.IntRange(min=0), default=0, show_default=True, help="Draws per question at temperature 1."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="By default 1024, or what the model has room for.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--out", type=click.Path(path_type=Path), help="By default evals/MODEL.TASK.SPLIT.sSEED.")
@click.option("--overwrite", is_flag=True, help="Draw anew what --out holds already.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on one line.")
def evaluate(
    model: str,
    task: str,
    split: str,
    limit: int | None,
    verdict: str | None,
    samples: int,
    max_new_tokens: int | None,
    seed: int,
    device: str,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure accuracy: greedy with its 95 % interval, and of draws at temperature 1 the mean, pass@k and the vote.

    Answers are kept as they finish in --out: the same command goes on from them, also with more --samples.
    """
    from minem.console import Progress, percent
    from minem.data.tasks import load_task
    from minem.data.verdict import pick_verdict
    from minem.em.estep import encode_prompt
    from minem.em.evaluate import answer_file
    from minem.em.evaluate import evaluate as run
    from minem.model.weights import resolve
    from minem.plugins import hash_source
    from minem.runs.directory import folder_name
    from minem.runs.record import fingerprint, hash_tokenizer

    loaded, check = load_task(task, limit, seed), pick_verdict(verdict)
    questions = getattr(loaded, split)
    folder = resolve(model)
    generator = _generator(str(folder), device)
    longest, id_ = max((len(encode_prompt(generator.tokenizer, question)), question.id) for question in questions)
    room = generator.max_length - longest  # known before the folder is made
    if room < (max_new_tokens or 1):
        advice = "lower --max-new-tokens" if room > 0 else "the model cannot be asked this"
        raise UserError(
            f"question {id_!r}: its prompt of {longest} tokens leaves {max(0, room)} of the model's "
            f"{generator.max_length} positions for max_new_tokens; {advice}"
        )
    new = max_new_tokens or min(1024, room)
    settings = {
        "model": fingerprint(folder)[:16],
        **{name: digest[:16] for name, digest in hash_tokenizer(generator.tokenizer).items()},
        "rows": loaded.rows_sha256[:16],
        "split": split,
        "limit": limit,
        "verdict": f"{verdict} {hash_source(verdict)[:16]}" if verdict else None,
        "max_new_tokens": new,
        "seed": seed,
        "dtype": str(generator.model.dtype).removeprefix("torch."),
        "device": generator.model.device.type,
        "minem": minem.__version__,
    }
    out = out or Path("evals") / folder_name(f"{model.strip('./')}.{task.strip('./')}.{split}.s{seed}")
    progress = Progress()
    with answer_file(out, settings, overwrite) as (known, append):
        if known:
            progress.note(f"{out} has {len(known)} answers already, which are not drawn again but with --overwrite")
        with progress.stage(f"{task} {split}", len(questions) * (1 + samples)) as line:
            _, summary = run(
                generator,
                questions,
                check,
                max_new_tokens=new,
                samples=samples,
                seed=seed,
                known=known,
                on_row=append,
                on_progress=lambda done, right, told: line.update(done, accuracy=percent(right / max(1, told))),
            )
    named = {"model": model, "task": task, "split": split, "max_new_tokens": new, "answers": str(out / "answers.jsonl")}
    _print({**named, **summary}, as_json, lambda: tables.eval_table(named, summary))


@main.command()
@click.option("--model", default="toy", show_default=True, help="Hugging Face folder, hub id, or toy.")
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
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--json", "as_json", is_flag=True, help="Print all with token ids and log-probabilities, on one line.")
def generate(
    model: str, prompt: str | None, prompts: Path | None, chat: bool, device: str, as_json: bool, **sampling: Any
) -> None:
    """Complete prompts."""
    if (prompt is None) == (prompts is None):
        raise UserError("give either --prompt TEXT or --prompts FILE.jsonl")
    texts = [prompt] if prompt is not None else _read_prompts(prompts)
    from minem.generation.request import SamplingParams

    try:
        params = SamplingParams(**sampling)
    except UserError as error:  # says "top_p = ..."
        name, _, rest = str(error).partition(" ")
        raise UserError(f"--{name.replace('_', '-')} {rest}") from error
    generator = _generator(model, device)
    asked: list[Any] = texts
    if chat:
        if not generator.tokenizer.has_chat_template:
            raise UserError(f"--chat: {model} has no chat template; leave --chat out")
        asked = [generator.tokenizer.chat([{"role": "user", "content": text}]) for text in texts]
    answers = generator.generate(asked, params)
    fields = ("token_ids", "text", "logprobs", "finish_reason")
    result = [
        {"prompt": text, "completions": [{field: getattr(c, field) for field in fields} for c in completions]}
        for text, completions in zip(texts, answers, strict=True)
    ]

    def show() -> None:
        for text, completions in zip(texts, answers, strict=True):
            if len(texts) > 1:
                say(f"> {clean(text)}")
            for completion in completions:
                say(completion.text)

    _print({"model": model, "results": result}, as_json, show)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--iteration", type=click.IntRange(min=1), help="Of this E-step alone.")
@click.option("--status", type=click.Choice(["accepted", "wrong", "unparsed", "truncated"]), help="With this verdict.")
@click.option("--question", metavar="ID", help="Of this question.")
@click.option("-n", "n", type=click.IntRange(min=0), default=10, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as one JSON object on one line.")
def show(run: Path, iteration: int | None, status: str | None, question: str | None, n: int, as_json: bool) -> None:
    """Show what the model wrote in the E-steps of a run, finished or not."""
    from minem.console import Progress
    from minem.report import show as shown
    from minem.report.reader import read_run, told_as_damage

    with told_as_damage(run):
        read = read_run(run)
        rows, matched = shown.matching(read, n, iteration, status, question)
        lines = list(shown.lines(rows))
    if rows and isinstance(read.task, str):
        Progress().note(f"note    {read.task}")

    def text() -> None:
        for line in lines:
            say(line)
        say(f"{len(rows):,} of {matched:,} samples that match" + ("; -n shows more" if matched > n else ""))

    _print({"run": str(run), "matched": matched, "samples": rows}, as_json, text)


@main.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), default="report.html", show_default=True)
def report(runs: tuple[Path, ...], out: Path) -> None:
    """Write one HTML page about one run or many, finished or not: charts, flips, samples, how to repeat them.

    Runs that differ in nothing but their seed are shown as their mean and spread.
    """
    from minem.report.page import write_report

    write_report(runs, out)
    say(str(out))


@main.command()
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--json", "as_json", is_flag=True, help="Print what was found as one JSON object on one line.")
def doctor(device: str, as_json: bool) -> None:
    """Print what this machine has and what each part will run on.

    A self-test of some seconds compares generator, loss and sampling with references; exit code 4 if one fails.
    """
    from minem.console import clean
    from minem.planning import doctor as doctors

    found = doctors.examine(device)
    _print(found, as_json, lambda: click.echo("\n".join(map(clean, doctors.lines(found)))))
    if not found["passed"]:
        failed = ", ".join(check["name"] for check in found["checks"] if not check["passed"])
        raise GuardError(f"self-tests failed: {failed}")


def _read_prompts(path: Path | None) -> list[str]:
    from minem.files import read_rows

    assert path is not None
    texts = []
    for number, row in enumerate(read_rows(path), start=1):
        if not isinstance(row.get("prompt"), str) or not row["prompt"]:
            raise UserError(f'{path}, row {number}: "prompt" must be a text of at least one character')
        texts.append(row["prompt"])
    if not texts:
        raise UserError(f'{path} has no rows; each must be like {{"prompt": "..."}}')
    return texts


def _generator(name: str, device: str) -> Any:
    from minem.device import limit_threads, pick_device, pick_dtype

    where = pick_device(device)
    model, tokenizer = minem.load(name, where, pick_dtype("auto", where))
    limit_threads(model)
    return minem.Generator(model, tokenizer, on_note=lambda note: say(f"note    {note}", err=True))


def _print(result: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        click.echo(json.dumps(result, allow_nan=False))
    else:
        show()
