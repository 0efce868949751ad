"""Whole runs: a config becomes a device, a model, a task, an E-step and an M-step, and they are set to work.

    minem train --sampler rsm --budget 8
    minem train --samples runs/first-look/iter-01/samples.jsonl

`build` gives each part its own section of the config. em/loop.py is what they do.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from threading import Timer
from typing import Any

import torch

import minem
from minem.config import Config, EvalSection
from minem.console import Progress
from minem.data.prompts import Prompts, Shots, make_prompts
from minem.data.tasks import SPLITS, Question, load_task
from minem.data.verdict import load_verdict
from minem.device import limit_threads, pick_device, pick_dtype, set_deterministic
from minem.em import diagnostics, warnings
from minem.em.checkpoints import restore
from minem.em.diagnostics import Diagnosis
from minem.em.estep import EStep
from minem.em.evaluate import Evaluation, summarise_answers
from minem.em.loop import Experiment
from minem.em.mstep import MStep
from minem.em.samplers import altered, make_sampler, prompts_of
from minem.em.samples_file import read_samples
from minem.errors import GuardError, UserError
from minem.generation.generator import DEFAULT_SLOTS, Generator
from minem.model.sizes import parameters
from minem.model.weights import load, load_model, read_config, resolve
from minem.plugins import hash_source
from minem.report.reader import checked, newest_model, read_run
from minem.runs.folder import answer_file, default_path, folder_name
from minem.runs.record import fingerprint, hash_tokenizer, model_card, public_name
from minem.runs.resume import last_model
from minem.runs.stages import Run, Session
from minem.statistics import mcnemar

LAST_STAGE = "report"  # of a whole run
PATIENCE = 2.0  # seconds until a start says what takes so long


def build(
    config: Config, session: Session | None = None, weights: bool = True, source: str | None = None
) -> Experiment:
    """The experiment of a config; wrong input is found here. weights: False leaves them on the disk, for a dry run.

    source: where the samples come from, if no sampler draws them.
    """
    session = session or Session()
    session.stop.at_work = False
    task = load_task(config.task.name, config.task.limit, config.run.seed, config.task.columns)
    device = pick_device(config.run.device)
    set_deterministic(device, config.run.deterministic)
    sampler = make_sampler(config.sampler.name, config.sampler.budget, config.sampler.draws)
    verdict = load_verdict(config.task.verdict)
    folder = resolve(config.model.id, config.model.revision)
    dtype = pick_dtype(config.model.dtype, device, parameters(read_config(folder)).total)
    model, tokenizer = load(folder, device if weights else "meta", dtype)
    if not tokenizer.eos_ids:
        raise UserError(f"{folder}: the tokenizer names no EOS token, so no draw could ever end")
    limit_threads(model)
    hint = config.sampler.hint if "hinted" in prompts_of(sampler) or config.eval.diagnostics else None
    prompts = make_prompts(tokenizer, config.task, hint, config.sampler.stop)
    slots = config.run.slots or DEFAULT_SLOTS[device.type]
    generator = hinted = Generator(model, tokenizer, slots=slots, on_note=session.progress.note)
    if config.sampler.proposal == "base" and "hinted" in prompts_of(sampler) and weights:
        hinted = Generator(load_model(folder, device, dtype), tokenizer, slots=slots, on_note=session.progress.note)
    estep = EStep(
        sampler=sampler,
        section=config.sampler,
        generators={"plain": generator, "hinted": hinted},
        prompts=prompts,
        verdict=verdict,
        seed=config.run.seed,
        score_plain=config.mstep.weights == "importance",
        pack_tokens=config.mstep.pack_tokens,
    )
    looked_at = diagnostics.choose(task.train, config.eval.diagnostics, config.run.seed)
    experiment = Experiment(
        section=config.run,
        task=task,
        estep=estep,
        mstep=MStep(model, config.mstep, session.ranks, config.run.seed, folder),
        evaluation=Evaluation(generator, prompts, verdict, config.eval, config.run.seed),
        diagnosis=Diagnosis(looked_at, estep, config.eval.hinted_draws),
        model_id=public_name(config.model.id),
        card=partial(model_card, config, Path(config.run.out or default_path(config)).name, source),
    )
    questions = sum(len(getattr(task, split)) for split in SPLITS)
    with slow_start(session.progress, f"rendering the prompts of {questions:,} questions"):
        longest_prompt(config, experiment)
    return experiment


@contextmanager
def slow_start(progress: Progress, what: str) -> Iterator[None]:
    """Print once what is done in the block, if that takes longer than PATIENCE."""
    timer = Timer(PATIENCE, progress.note, [f"start   {what}"])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def longest_prompt(config: Config, experiment: Experiment) -> tuple[int, int]:
    """The tokens of the longest prompt and the most new ones. UserError for a prompt that leaves these no room."""
    task, section, prompts = experiment.task, config.sampler, experiment.estep.prompts
    hinted = [kind == "hinted" for kind in prompts_of(experiment.estep.sampler)]
    generator, new = experiment.estep.generators["plain"], config.eval.max_new_tokens
    asked = ((question, prompts.trained(question)) for question in (*task.validation, *task.test))
    trained = ((question, prompts.trained(question)) for question in task.train)
    drawn = ((question, prompts.drawn(question, kind)) for question in task.train for kind in hinted)
    longest = measure(generator, asked, new, "eval.max_new_tokens")
    drawn_longest = measure(generator, chain(trained, drawn), section.max_new_tokens, "sampler.max_new_tokens")
    return max(longest, drawn_longest), max(new, section.max_new_tokens)


def measure(generator: Generator, prompts: Iterable[tuple[Question, Sequence[int]]], new: int, key: str) -> int:
    """The tokens of the longest prompt. UserError for one that leaves no room for `new` tokens, whose number `key`
    sets, or that has a token which the model has no embedding of, as some added tokens."""
    longest, positions, size = 0, generator.max_length, generator.model.config.vocab_size
    for question, prompt in prompts:
        if (last := max(prompt)) >= size:
            token = f"{generator.tokenizer.decode([last], skip_special_tokens=False)!r}, number {last}"
            found = f"its prompt has the token {token}, and the model's vocabulary is {size}"
            raise UserError(f"question {question.id!r}: {found}")
        if len(prompt) + new > positions:
            advice = f"lower {key}" if len(prompt) < positions else "take fewer or no shots"
            raise UserError(
                f"question {question.id!r}: its prompt of {len(prompt)} tokens does not leave {new} of the "
                f"model's {positions} positions; {advice}"
            )
        longest = max(longest, len(prompt))
    return longest


@contextmanager
def opened(config: Config, experiment: Experiment, session: Session, **inputs: str) -> Iterator[Run]:
    """The run's directory, made or resumed, with the weights that it has by then. inputs: more of its fingerprints."""
    task, tokenizer = experiment.task, experiment.estep.prompts.tokenizer
    inputs = {
        "task rows": task.rows_sha256,
        "base model": fingerprint(resolve(config.model.id, config.model.revision)),
        **hash_tokenizer(tokenizer),
        "prompts": experiment.estep.prompts.words.sha256,
        **inputs,
    }
    for key, name in (("sampler", config.sampler.name), ("verdict", config.task.verdict or "")):
        if ":" in name:  # the user's own code is part of the experiment, too
            inputs[f"{key} {name}"] = hash_source(name)
    with Run.open(config, session, inputs) as run:
        experiment.run = run
        for line in describe(config, experiment, inputs.get("samples")):
            session.progress.note(line)
        restore(run, last_model(run.results), experiment.mstep)
        yield run


def train(config: Config, session: Session | None = None) -> dict[str, Any]:
    """Run or resume the whole EM loop; accuracy.png and report.html end its directory. Returns `summarise` of it."""
    session = session or Session()
    experiment = build(config, session)
    with opened(config, experiment, session) as run:
        reserve(config, experiment, session.progress)
        experiment.train()
        conclude(run)
        with checked(run.path):
            return summarise(run)


def reserve(config: Config, experiment: Experiment, progress: Progress) -> None:
    """Make room for all that the run will draw, and print how much that is: the last before its first stage."""
    longest = longest_prompt(config, experiment)
    for generator in dict.fromkeys(experiment.estep.generators.values()):
        progress.note(f"cache   {generator.reserve(*longest)}")
    experiment.run.stop.at_work = True


def conclude(run: Run) -> None:
    """What ends a run's directory: its picture and its report."""
    from minem.report.charts import plot_accuracy  # here: matplotlib takes half a second to load
    from minem.report.page import write_report

    directory = run.directory
    if directory is not None and "plot" not in directory.results:
        with directory.stage("plot") as record:
            plot_accuracy(run.path, record.path("accuracy.png"))
    if directory is not None and LAST_STAGE not in directory.results:
        with directory.stage(LAST_STAGE) as record:
            write_report([run.path], record.path("report.html"))


def sample(config: Config, iteration: int, session: Session | None = None) -> dict[str, Any]:
    """The E-step of one iteration alone, from the weights that the run has by then."""
    session = session or Session()
    if session.overwrite and iteration > 1:
        raise UserError(f"--overwrite would remove the model that --iteration {iteration} needs; give one of the two")
    experiment = build(config, session)
    with opened(config, experiment, session) as run:
        if iteration > 1 and not run.finished(iteration - 1, "mstep"):
            before = f"iter-{iteration - 1:02d}"
            raise UserError(f"--iteration {iteration} needs the model of {before}, which {run.path} does not have")
        reserve(config, experiment, session.progress)
        experiment.e_step(iteration)
        samples = run.path / f"iter-{iteration:02d}" / "samples.jsonl"
        return {"run": str(run.path), "samples": str(samples), **run.result(iteration, "estep")}


def train_on_samples(config: Config, file: Path, session: Session | None = None) -> dict[str, Any]:
    """The M-step alone, on rows made anywhere, as `read_samples` chooses them."""
    session = session or Session()
    if not os.path.isfile(file):
        raise UserError(f"--samples {file} is not a file")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if config.run.out is None:
        config = config.changed({"run.out": str(default_path(config, f"samples-{digest[:8]}"))})
    config = config.changed({"run.iterations": 1})
    experiment = build(config, session, source=f"on samples of the file `{public_name(file.name)}` (SHA-256 {digest})")
    sizes = experiment.estep.generators["plain"].max_length, experiment.mstep.model.config.vocab_size
    rules = config.mstep.weights, config.sampler.drop_leaks
    samples = read_samples(file, experiment.task, experiment.estep.prompts, *sizes, *rules)
    samples = [sample for sample in samples if experiment.estep.keeps(sample)]
    if not samples:
        raise GuardError(f"{file}: no row is accepted by its status and by [sampler], so there is nothing to train on")
    endless = sum(sample.token_ids[-1] not in experiment.estep.prompts.tokenizer.eos_ids for sample in samples)
    if endless:
        rows = f"{endless} of {len(samples)} rows"
        session.progress.note(f"note    {rows} do not end in EOS: the model learns not to stop there")
    with opened(config, experiment, session, samples=digest) as run:
        session.stop.at_work = True
        experiment.m_step(1, samples)
        return {"run": str(run.path), "model": str(run.path / "iter-01" / "model"), **run.result(1, "mstep")}


def summarise(run: Run) -> dict[str, Any]:
    """The numbers that a finished run ends with, read from its journal and its evaluation files."""
    last = run.config.run.iterations
    lost, won = map(len, read_run(run.path).flips)
    iterations = [{"iteration": i, "validation": run.result(i, "eval.validation")} for i in range(last + 1)]
    for i, row in enumerate(iterations[1:], start=1):
        row |= {stage: run.result(i, stage) for stage in ("estep", "mstep")}
    return {
        "run": str(run.path),
        "model": str(run.path / f"iter-{last:02d}" / "model") if last else run.config.model.id,
        "iterations": iterations,
        "test": {
            "base": run.result(0, "eval.test"),
            "last": run.result(last, "eval.test"),
            "wrong_to_right": won,
            "right_to_wrong": lost,
            "mcnemar_p": mcnemar(lost, won),
        },
    }


def evaluate(
    model: str,
    task: str,
    split: str,
    *,
    limit: int | None = None,
    columns: Sequence[str] = (),
    prompt: str | None = None,
    shots: Shots = "none",
    stop: Sequence[str] = (),
    verdict: str | None = None,
    samples: int = 0,
    max_new_tokens: int | None = None,
    seed: int = 0,
    device: str = "auto",
    out: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model, or the newest of a run, on a split of a task; answers are kept in `out`, not drawn again."""
    progress, model = progress or Progress(), newest_model(model)
    loaded, check, folder = load_task(task, limit, seed, columns), load_verdict(verdict), resolve(model)
    questions = getattr(loaded, split)
    generator = make_generator(str(folder), device, progress)
    keys = {"task.name": task, "task.prompt": prompt, "task.shots": shots, "run.out": out and str(out)}
    prompts = make_prompts(generator.tokenizer, Config().changed(keys).task, None, stop)
    asked = ((question, prompts.trained(question)) for question in questions)
    longest = measure(generator, asked, max_new_tokens or 1, "--max-new-tokens")  # before the folder is made
    new = max_new_tokens or min(512, generator.max_length - longest)
    settings = {
        "model": fingerprint(folder)[:16],
        **{name: digest[:16] for name, digest in hash_tokenizer(prompts.tokenizer).items()},
        "prompts": prompts.sha256[:16],
        "rows": loaded.rows_sha256[:16],
        **{"split": split, "limit": limit, "seed": seed, "max_new_tokens": new, "minem": minem.__version__},
        "verdict": f"{verdict} {hash_source(verdict)[:16]}" if verdict else None,
        "dtype": str(generator.model.dtype).removeprefix("torch."),
        "device": generator.model.device.type,
    }
    out = out or Path("evals") / folder_name(f"{model.strip('./')}.{task.strip('./')}.{split}.s{seed}")
    evaluation = Evaluation(generator, prompts, check, EvalSection(max_new_tokens=new, samples=samples), seed)
    with answer_file(out, settings, overwrite) as (known, append):
        kept = [f"{out} has {len(known)} answers already, which are not drawn again without --overwrite"]
        for sentence in first_question(prompts, questions) + kept[: len(known)]:
            progress.note(sentence)
        with progress.stage(f"{task} {split}", evaluation.total(questions)) as line:
            answers = evaluation.answers(questions, line.update, known, append)
    found = summarise_answers(questions, answers, samples)
    for sentence in warnings.of_answers(found):
        progress.note(f"warning {sentence}")
    named = {"model": model, "task": task, "split": split, "max_new_tokens": new, "answers": str(out / "answers.jsonl")}
    return named | found


def make_generator(name: str, device: str, progress: Progress) -> Generator:
    """The generator of a model, on a device by its name."""
    where, folder = pick_device(device), resolve(name)
    model, tokenizer = load(folder, where, pick_dtype("auto", where, parameters(read_config(folder)).total))
    limit_threads(model)
    return Generator(model, tokenizer, on_note=progress.note)


def first_question(prompts: Prompts, questions: Sequence[Question]) -> list[str]:
    """The user's turn of the first prompt, line by line, and notes about what stands in all or in some questions."""
    first = prompts.words.messages(prompts.escaped(questions[0]))[-1]["content"][:2000].splitlines()
    lines = [f"{margin}{line}" for margin, line in zip(chain(["first   "], repeat(" " * 8)), first, strict=False)]
    lines.append(f"        (right: {questions[0].gold})")
    if held := sum(prompts.escaped(question) != question for question in questions):
        remedy = "a space in each keeps it text (task.special_tokens)"
        lines.append(f"note    control tokens of the tokenizer stand in the text of {held} question(s): {remedy}")
    if len(questions) >= 20 and questions[0].labels and len({question.gold for question in questions}) == 1:
        lines.append(f"note    {questions[0].gold} is right in all questions: a model learns to answer that alone")
    return lines


def describe(config: Config, experiment: Experiment, samples: str | None = None) -> list[str]:
    """Every value that was inferred, and what is unusual: the first lines that a run prints.

    samples: the SHA-256 of the file that they come from, if no sampler draws them.
    """
    task, mstep, model = experiment.task, experiment.mstep, experiment.mstep.model
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    threads = f", {torch.get_num_threads()} thread(s)" if model.device.type == "cpu" else ""
    sizes = f"{len(task.train)} train, {len(task.validation)} validation, {len(task.test)} test questions"
    dtype = str(model.dtype).removeprefix("torch.")
    size, count = config.run.questions_per_iteration, len(task.train)
    lines = [
        f"model   {config.model.id}: {millions:,.2f} M parameters, {dtype} on {model.device}{threads}",
        f"task    {task.name}: {sizes}" + (f" ({task.note})" if task.note else ""),
        *first_question(experiment.estep.prompts, task.train),
    ]
    if samples is None:
        section = config.sampler
        lines.append(f"sampler {section.name}: budget {section.budget}, draws {section.draws}")
    if mstep.ranks.size > 1:
        lines.append(f"ranks   {mstep.ranks.size} processes; the M-step's weights: {mstep.strategy}")
    if mstep.lora is not None:
        lines.append(
            f"lora    rank {mstep.lora.rank}, alpha {mstep.lora.alpha:g}, {mstep.trained_parameters / 1e6:,.2f} M "
            f"parameters trained beside {', '.join(mstep.lora.targets)}"
        )
    if size is not None and samples is None:
        lines.append(f"E-step  {min(size, count)} of {count} training questions in each iteration")
    lines.append(f"run     {experiment.run.path}")
    if (changed := altered(config.sampler, config.task.shots)) and samples is None:
        lines.append(f"note    {', '.join(changed)}: the draws follow this altered policy, not the model's posterior")
    if config.mstep.lr > 1e-4 and millions > 10 and mstep.lora is None:
        lines.append(f"note    mstep.lr = {config.mstep.lr:g} is high for a model of this size; 1e-5 is usual")
    return lines
