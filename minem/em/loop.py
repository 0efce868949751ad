"""The EM loop: E-step, filter, M-step, evaluation, iteration after iteration, in a run directory that can be continued.

    minem train --sampler rsm --budget 8

Each stage is a method of `Experiment` that is skipped where the journal says that it is done. The weights at any point
are those of the last finished M-step (or the base model), so that a continued run goes on from the same place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from minem.config import default_budget
from minem.console import Progress, percent
from minem.data.tasks import Question, load_task
from minem.data.verdict import load_verdict
from minem.device import give_back, limit_threads, pick_device, pick_dtype, set_deterministic
from minem.em import diagnostics
from minem.em import warnings as health
from minem.em.checkpoints import Checkpoints
from minem.em.estep import Counts, EStep, blocks, encode_prompt, minibatch
from minem.em.evaluate import evaluate
from minem.em.mstep import MStep
from minem.em.packing import Example
from minem.em.samplers import Prompt, altered, make_sampler
from minem.em.scoring import DRAWS, agreement
from minem.em.weighting import add_plain_logprobs, read_examples
from minem.errors import GuardError, NotFinite, UserError
from minem.files import read_rows, write_rows, write_whole
from minem.generation.generator import DEFAULT_SLOTS, Generator
from minem.generation.request import Completion, SamplingParams
from minem.model.decoder import Model
from minem.model.weights import load, load_model, read_weights, resolve, save, saved_bytes, verify
from minem.parallel.follower import Follower
from minem.parallel.ranks import ALONE, Ranks
from minem.parallel.signals import Stop
from minem.plugins import hash_source
from minem.runs import resume as recovery
from minem.runs.describe import describe, model_card
from minem.runs.directory import PARTIAL, RunDirectory
from minem.runs.record import fingerprint, hash_prompts, hash_tokenizer
from minem.runs.tracking import tracked

if TYPE_CHECKING:
    from minem.config import Config

ROW_BYTES, TOKEN_BYTES = 500, 14  # of a row of JSON, about: 14 for each token's id and text


class Experiment:
    """One run: its config, its model and, once `open`, its directory.

    Everything that can be wrong with the input is found before the directory is touched.

    Among several processes (`ranks`) each has the whole model and draws its share of the questions; the first one
    collects what the others drew, and it alone writes. `stop` is looked at all the time.

    weights: False leaves them on the disk, for a dry run: the model has its shape alone.
    """

    run: RunDirectory
    behind: list[int]  # iterations whose M-step `catch_up` has to do again

    def __init__(
        self,
        config: Config,
        progress: Progress,
        ranks: Ranks = ALONE,
        stop: Stop | None = None,
        weights: bool = True,
    ):
        self.config = config
        self.progress = progress
        self.ranks = ranks
        self.stop = Stop() if stop is None else stop
        self.task = load_task(config.task.name, config.task.limit, config.run.seed)
        self.device = pick_device(config.run.device)
        set_deterministic(self.device, config.run.deterministic)
        self.dtype = pick_dtype(config.model.dtype, self.device)
        self.sampler = make_sampler(config.sampler.name, config.sampler.budget, config.sampler.draws)
        self.verdict = load_verdict(config.task.verdict)
        self.base_folder = resolve(config.model.id, config.model.revision)
        self.model, self.tokenizer = load(self.base_folder, self.device if weights else "meta", self.dtype)
        if not self.tokenizer.eos_ids:
            raise UserError(f"{self.base_folder}: the tokenizer names no EOS token, so no draw could ever end")
        limit_threads(self.model)
        self.generator = self._generator(self.model)
        self.mstep = MStep(self.model, config.mstep, ranks, config.run.seed, self.base_folder)
        self.mstep.on_note = self._note
        self.longest = self._check_lengths()

    @contextmanager
    def open(
        self,
        command: Sequence[str],
        overwrite: bool,
        tracker: ModuleType | None = None,
        origins: Mapping[str, str] | None = None,
        **inputs: str,
    ) -> Iterator[RunDirectory]:
        """Make the run's directory or continue the run that is in it, with the weights that it has by now."""
        questions = self.task.train + self.task.validation + self.task.test
        inputs = {
            "task rows": self.task.rows_sha256,
            "base model": fingerprint(self.base_folder),
            **hash_tokenizer(self.tokenizer),
            "prompts": hash_prompts(questions, self.config.sampler.hint),
            **inputs,
        }
        for key, name in (("sampler", self.config.sampler.name), ("verdict", self.config.task.verdict or "")):
            if ":" in name:  # the user's own code is part of the experiment, too
                inputs[f"{key} {name}"] = hash_source(name)
        if self.ranks.first:
            self.run = RunDirectory.open(
                self.config, command=command, overwrite=overwrite, inputs=inputs, origins=origins
            )
            self.run.on_finished = lambda stage, result: self.ranks.publish(f"stage/{stage}", result)
            for change in self.run.changes:
                self._note(f"{change}, since this run was started; it is memory and time alone, but for rounding")
            if sentence := recovery.go_back(self.run):
                self.progress.note(f"warning {sentence}")
            whole, self.behind = recovery.whole_model(self.run)
            self.ranks.publish("run", [str(self.run.path), whole, self.behind])
        else:
            path, whole, self.behind = self.ranks.receive("run")
            self.run = Follower(Path(path), self.config, self.ranks)
        with self.run:
            describe(self)
            self._restore(whole)
            with tracked(self.run, tracker, self.progress):
                yield self.run

    # ---------------------------------------------------------------------------------------------------- the loop

    def train(self, select: Callable[[int], Sequence[Example] | None] = lambda iteration: None) -> None:
        """All iterations, from wherever the run stands.

        select: called with the iteration before its M-step for the examples to train on; None stands for all accepted.
        """
        last = self.config.run.iterations
        self.catch_up(select)
        self.reserve()
        self.evaluate(0, "validation", self.task.validation)
        self.evaluate(0, "test", self.task.test)
        for iteration in range(1, last + 1):
            self.e_step(iteration)
            self.diagnose(iteration)
            self.m_step(iteration, select(iteration))
            self.evaluate(iteration, "validation", self.task.validation)
        self.evaluate(last, "test", self.task.test)

    def reserve(self) -> None:
        """Make room for all that the run will draw, and say how much that is."""
        _ = self._hinted_generator  # a second model takes its memory first
        self.progress.note(f"cache   {self.generator.reserve(*self.longest)}")

    def questions(self, iteration: int) -> list[Question]:
        """The training questions that an iteration draws on."""
        run = self.config.run
        return minibatch(self.task.train, run.questions_per_iteration, run.seed, iteration)

    def e_step(self, iteration: int) -> None:
        """Draw rationales for its questions; samples.jsonl has every attempt, accepted.jsonl what is kept."""
        stage, folder = f"iter-{iteration:02d}/estep", f"iter-{iteration:02d}"
        if not self._skip(stage):
            self._draw_blocks(iteration, stage, folder)
        # Outside the stage, so that a run that died between the two still cleans up.
        for block in sorted((self.run.path / folder).glob("samples.*.jsonl")):
            self.run.discard(f"{folder}/{block.name}")

    def _draw_blocks(self, iteration: int, stage: str, folder: str) -> None:
        sampler = self.config.sampler
        step = EStep(
            sampler=self.sampler,
            budget=sampler.budget or default_budget(sampler.name),
            generators={"plain": self.generator, "hinted": self._hinted_generator},
            verdict=self.verdict,
            params=SamplingParams(
                temperature=sampler.temperature,
                top_k=sampler.top_k,
                top_p=sampler.top_p,
                min_p=sampler.min_p,
                max_new_tokens=sampler.max_new_tokens,
            ),
            hint=sampler.hint,
            seed=self.config.run.seed,
            iteration=iteration,
            keep_all=sampler.filter == "none",
            drop_leaks=sampler.drop_leaks,
            lengths=self._lengths_before(iteration),
        )
        # A run that goes on keeps its blocks, even where memory or processes give another number of slots now.
        begun = self.run.finished(f"{stage}.1")
        slots = self.run.result(f"{stage}.1")["slots"] if begun else int(self.ranks.total([self.generator.slots])[0])
        parts = blocks(self.questions(iteration), slots)
        stages = [f"{stage}.{number}" for number in range(1, len(parts) + 1)]
        # Tokens of blocks that were done before: they took none of the time that is measured now.
        known = sum(self.run.result(block)["counts"]["tokens"] for block in stages if self.run.finished(block))
        counts = Counts(questions=0)
        with self._line(iteration, "E-step", sum(map(len, parts))) as line:
            for block, questions in zip(stages, parts, strict=True):
                counts += self._block(step, block, questions, counts, known, line, slots)
            rate = (counts.tokens - known) / max(1e-9, line.elapsed)
        names = [f"{folder}/samples.{number}.jsonl" for number in range(1, len(parts) + 1)]
        size = sum((self.run.path / name).stat().st_size for name in names) if self.ranks.first else 0
        with self.run.stage(stage, writes=2 * size) as record:
            if not self.ranks.first:
                return
            rows = [row for name in names for row in read_rows(self.run.path / name)]
            kept = [row for row in rows if row.pop("kept")]
            write_rows(record.path(f"{folder}/samples.jsonl"), rows)
            write_rows(record.path(f"{folder}/accepted.jsonl"), kept)
            record.result.update(counts.summary(), valid=self._valid_share(kept), altered=altered(self.config.sampler))
            record.result.update(self.run.result(f"{stage}.1")["agreement"])
            record.result["warnings"] = health.of_draws(record.result)
            self.run.log_metrics(stage, **record.result, tokens_per_second=rate)
        self._warn(stage)

    def _block(
        self, step: EStep, stage: str, questions: Sequence[Question], before: Counts, known: int, line: Any, slots: int
    ) -> Counts:
        """One block of an E-step, on the disk when it is done: its rows with `kept`, and its counts in the journal.

        before, known: the counts of the blocks before it, and the tokens of those that this process has not drawn.
        """
        if self.run.finished(stage):
            return Counts.from_dict(self.run.result(stage)["counts"])
        compared: list[Completion] = []
        first = stage == "iter-01/estep.1"

        def show(counts: Counts) -> None:
            self.stop.check(stage)
            total = before + counts
            line.update(
                total.done,
                solved=percent(total.solved / max(1, total.done)),
                accepted=percent(total.statuses["accepted"] / max(1, total.attempts)),
                tokens=total.tokens,
                tokens_per_s=(total.tokens - known) / max(1e-9, line.elapsed),
            )

        def compare(draw: Completion, prompt: Prompt) -> None:
            own = step.generators[prompt] is self.generator  # not drawn from a copy of the base model
            if first and own and len(compared) < DRAWS:
                compared.append(draw)

        with self.run.stage(stage, writes=self._row_bytes(questions, self.config.sampler.max_new_tokens)) as record:
            own = self._own(questions, [step.lengths.get(question.id, 1.0) for question in questions])
            rows, counts = step.run(own, show, compare)
            mstep = self.config.mstep
            if mstep.weights == "importance":
                by_id = {question.id: question for question in own}
                add_plain_logprobs(rows, by_id, self.model, self.tokenizer, mstep.pack_tokens)
            rows, shares = self._collect(stage, rows, vars(counts))
            if not self.ranks.first:
                return counts
            order = {question.id: place for place, question in enumerate(questions)}
            rows.sort(key=lambda row: order[row["id"]])
            counts = sum(map(Counts.from_dict, shares), Counts(questions=0))
            agreed = {}
            if compared:
                found = agreement(self.model, compared, self.config.mstep.pack_tokens)
                found.require(self.dtype)
                agreed = {"logprob_difference": found.difference, "policy_kl": found.kl}
            write_rows(record.path(stage.replace("estep", "samples") + ".jsonl"), rows)
            record.result.update(counts=vars(counts), slots=slots, agreement=agreed)
            show(counts)
        return counts

    def _own(self, questions: Sequence[Question], costs: Sequence[float]) -> list[Question]:
        """This process's share of the questions."""
        return [questions[place] for place in self.ranks.share(costs)]

    def _collect(self, stage: str, rows: list[dict[str, Any]], extra: Any) -> tuple[list[dict[str, Any]], list[Any]]:
        """Bring the rows of all processes to the first one, with one JSON value of each; the others get their own.

        Rows go by way of the run's folder, which all processes share, under names that do not outlive it.
        """
        extras = [extra]
        shares = {r: self.run.path / f"{PARTIAL}{stage.replace('/', '.')}.{r}.jsonl" for r in range(1, self.ranks.size)}
        if not self.ranks.first:
            write_rows(shares[self.ranks.rank], rows)
            self.ranks.publish(f"share/{stage}/{self.ranks.rank}", extra)
            return rows, extras
        for rank, share in shares.items():
            extras.append(self.ranks.receive(f"share/{stage}/{rank}"))
            rows = [*rows, *read_rows(share)]
            share.unlink()
        return rows, extras

    def _lengths_before(self, iteration: int) -> dict[str, float]:
        """The mean tokens of each question's draws when it was last drawn on; none are known before the first time."""
        size = self.config.run.questions_per_iteration
        known: dict[str, float] = {}
        back = 1 if size is None else 2 * -(-len(self.task.train) // size)  # two passes have seen it at least once
        for earlier in range(max(1, iteration - back), iteration):
            file = self.run.path / f"iter-{earlier:02d}" / "samples.jsonl"
            lengths: dict[str, list[int]] = {}
            for row in read_rows(file) if file.exists() else ():
                lengths.setdefault(row["id"], []).append(len(row["token_ids"]))
            known |= {id: sum(tokens) / len(tokens) for id, tokens in lengths.items()}
        return known

    def diagnose(self, iteration: int) -> None:
        """What hinted draws on a few training questions say about the model that the E-step drew from."""
        stage, folder = f"iter-{iteration:02d}/diagnostics", self.run.path / f"iter-{iteration:02d}"
        config = self.config
        if not config.eval.diagnostics or self._skip(stage):
            return
        questions = diagnostics.choose(self.task.train, config.eval.diagnostics, config.run.seed)
        total = len(questions) * (config.eval.hinted_draws + 1)
        with self.run.stage(stage) as record, self._line(iteration, "diagnostics", total) as line:
            if not self.ranks.first:  # a few draws: not worth sharing
                return

            def show(done: int) -> None:
                self.stop.check(stage)
                line.update(done)

            draws = diagnostics.draw(
                questions,
                self.generator,
                self._hinted_generator,
                self.verdict,
                hint=config.sampler.hint,
                hinted_draws=config.eval.hinted_draws,
                max_new_tokens=config.sampler.max_new_tokens,
                pack_tokens=config.mstep.pack_tokens,
                seed=config.run.seed,
                iteration=iteration,
                on_progress=show,
            )
            by_id = {question.id: question for question in self.task.train}
            summary = diagnostics.summarise(draws)
            summary["early"] = diagnostics.early_share(read_rows(folder / "accepted.jsonl"), by_id)
            summary["attempts"] = diagnostics.acceptance(read_rows(folder / "samples.jsonl"))
            first = self.run.result("iter-01/diagnostics") if iteration > 1 else summary
            summary["falling"] = diagnostics.falling(first, summary)
            line.update(**{label: diagnostics.shown(summary, key) for key, (label, _) in diagnostics.EXPLAINED.items()})
            record.result.update(summary)
            self.run.log_metrics(stage, **summary)
        if iteration == 1:
            for label, sentence in diagnostics.EXPLAINED.values():
                self.progress.note(f"        {label}: {sentence}")
        if summary["falling"]:
            before, now = (diagnostics.shown(one, "hinted") for one in (first, summary))
            self.progress.note(
                f"warning hinted acceptance fell from {before} to {now} since iteration 1: {diagnostics.FALLING_RULE}"
            )

    def m_step(self, iteration: int, examples: Sequence[Example] | None = None) -> None:
        """Train on the kept rows of this iteration (or on `examples`) and write the model."""
        folder = f"iter-{iteration:02d}"
        stage = f"{folder}/mstep"
        minutes = self.config.run.checkpoint_minutes
        checkpoints = Checkpoints(self.run, self.mstep, stage, minutes, self.ranks, self.stop)
        if not self._skip(stage):
            if examples is None:
                examples = self.examples(self.run.path / folder / "accepted.jsonl", lambda row: True)
            if not examples:
                raise GuardError(self._nothing_to_train_on(iteration))
            self._prepare_training()
            state = self._state_is_needed(iteration)
            size = saved_bytes(self.model) + state * self.mstep.state_bytes
            with self.run.stage(stage, writes=size) as record, self._line(iteration, "M-step") as line:

                def show(row: dict[str, Any]) -> None:
                    line.total = row["steps"]
                    line.update(row["step"], **_facts(row))
                    self.run.log_metrics(stage, **row)
                    checkpoints.after_step(row)

                for row in checkpoints.resume():
                    self.run.log_metrics(stage, **row)
                summary = self._train(examples, iteration, show)
                give_back(self.device)
                if state:
                    self.mstep.save(record.path(f"{folder}/state") if self.ranks.first else self.run.path)
                adapter = self.mstep.complete_masters() if self.mstep.lora is not None else {}
                if not self.ranks.first:
                    return
                if self.mstep.lora is not None:
                    place = record.path(f"{folder}/adapter")
                    self.mstep.lora.save(place, adapter, self.config.model.id)
                    self.mstep.lora.verify(place, adapter)
                model = record.path(f"{folder}/model")
                save(self.model, self.tokenizer, model)
                verify(self.model, self.tokenizer, model)
                (model / "README.md").write_text(model_card(self, iteration), encoding="utf-8")
                record.result.update(summary)
                record.result["warnings"] = self._health(iteration, self.mstep.losses, summary["entropy"])
            self._warn(stage)
        # Outside the stage, so that a run that died between the two still cleans up.
        checkpoints.clear()
        self.run.discard(f"iter-{iteration - 1:02d}/state")
        if self.config.run.keep == "last":
            self.run.discard(f"iter-{iteration - 1:02d}/model")
            self.run.discard(f"iter-{iteration - 1:02d}/adapter")

    def evaluate(
        self, iteration: int, split: str, questions: Sequence[Question], known: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        """Accuracy of the model as it is after `iteration` (0: the base model); `known` answers are not drawn again."""
        folder = f"iter-{iteration:02d}"
        stage = f"{folder}/eval.{split}"
        if self._skip(stage):
            return
        total = len(questions) * (1 + self.config.eval.samples)
        size = self._row_bytes(questions, self.config.eval.max_new_tokens)
        with self.run.stage(stage, writes=size) as record, self._line(iteration, split, total) as line:

            def show(finished: int, right: int, answered: int) -> None:
                self.stop.check(stage)
                line.update(finished, accuracy=percent(right / max(1, answered)))

            measure = partial(
                evaluate,
                self.generator,
                verdict=self.verdict,
                max_new_tokens=self.config.eval.max_new_tokens,
                samples=self.config.eval.samples,
                seed=self.config.run.seed,
                on_progress=show,
            )
            if self.ranks.size > 1:
                answers: list[dict[str, Any]] = []
                known = list(known)
                measure(self._own(questions, [1.0] * len(questions)), known=known, on_row=answers.append)
                known = [*known, *self._collect(stage, answers, None)[0]]
                if not self.ranks.first:
                    return
            rows, summary = measure(questions, known=known)
            line.update(accuracy=percent(summary["accuracy"], (summary["low"], summary["high"])))
            write_rows(record.path(f"{folder}/eval.{split}.jsonl"), rows)
            record.result.update(summary)
            self.run.log_metrics(stage, **summary)

    # ---------------------------------------------------------------------------------------------------- the parts

    def examples(self, file: Path, keep: Callable[[Mapping[str, Any]], bool]) -> list[Example]:
        """What is trained of the rows that `keep` keeps: `minem.em.weighting.read_examples`."""
        return read_examples(file, keep, self.task, self.tokenizer, self.generator.max_length, self.config.mstep)

    @cached_property
    def _hinted_generator(self) -> Generator:
        """Hinted draws come from the current model, or from a second copy of the base model."""
        if self.config.sampler.proposal == "current" or self.config.sampler.name == "rsm":  # rsm never hints
            return self.generator
        base = load_model(self.base_folder, self.device, self.dtype)
        return self._generator(base)

    def _note(self, text: str) -> None:
        self.progress.note(f"note    {text}")

    def _generator(self, model: Model) -> Generator:
        slots = self.config.run.slots or DEFAULT_SLOTS[self.device.type]
        return Generator(model, self.tokenizer, slots=slots, on_note=self._note)

    def _prepare_training(self) -> None:
        """The weights that an M-step starts from, and memory for it."""
        if self.config.run.init == "base":
            read_weights(self.model, self.base_folder)
            self.mstep.reset()
        self._make_room()

    def _make_room(self) -> None:
        """Where the cache and the M-step do not fit into memory together, the cache goes and is made anew."""
        give_back(self.device)
        needed, room = self.mstep.memory_needed(), self.mstep.room()
        if needed > room and (held := self.generator.release()):
            self.progress.note(
                f"note    the M-step needs about {needed / 1e9:.1f} GB and has {room / 1e9:.1f} GB of room: the cache "
                f"({held / 1e9:.1f} GB) and its graphs were released, and are made anew by the next draws"
            )

    def _restore(self, iteration: int) -> None:
        """Take the weights that an iteration ended with; 0 is the base model, whose weights are there already."""
        if iteration:
            folder = self.run.path / f"iter-{iteration:02d}"
            if self.mstep.lora is None:  # else the adapters are merged into the base weights, which are in place
                read_weights(self.model, folder / "model")
                self.mstep.reset()
            if (folder / "state").exists():
                self.mstep.load(folder / "state")

    def catch_up(self, select: Callable[[int], Sequence[Example] | None] = lambda iteration: None) -> None:
        """Train again what is not on the disk any more, from the last whole model on: the same examples, no new draws.

        select: as for `train`.
        """
        while self.behind:
            iteration = self.behind[0]
            folder = self.run.path / f"iter-{iteration:02d}"
            self.progress.note(f"note    {folder.name}/model is missing or damaged: trained again, in memory")
            examples = select(iteration)
            if examples is None:
                examples = self.examples(folder / "accepted.jsonl", lambda row: True)
            self._prepare_training()
            self._train(examples, iteration, lambda row: self.stop.check("training again"))
            del self.behind[0]

    def _train(
        self, examples: Sequence[Example], iteration: int, on_step: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """The M-step itself; what was not finite in it is left in the run's log."""
        try:
            return self.mstep.run(examples, self.config.run.seed, iteration, on_step)
        except NotFinite as error:
            if not self.ranks.first:
                raise
            dump = self.run.path / "log" / f"not-finite.iter-{iteration:02d}.json"
            dump.parent.mkdir(exist_ok=True)
            write_whole(dump, (json.dumps(error.dump) + "\n").encode())
            raise GuardError(f"iteration {iteration}: {error}; their tokens are in {dump}") from error

    def _row_bytes(self, questions: Sequence[Question], max_new_tokens: int) -> int:
        """About what a row of the longest kind for each question takes on the disk."""
        return len(questions) * (ROW_BYTES + TOKEN_BYTES * max_new_tokens)

    def _health(self, iteration: int, losses: Sequence[float], entropy: float | None) -> list[str]:
        before = [self.run.result(f"iter-{i:02d}/mstep")["entropy"] for i in range(1, iteration)]
        drawn = f"iter-{iteration:02d}/estep"
        solved = None
        if self.run.finished(drawn):  # it is not where the M-step is done alone
            solved = self.run.result(drawn)["solved"] / self.run.result(drawn)["questions"]
        return health.of_training(losses, [*before, entropy], solved)

    def _warn(self, stage: str) -> None:
        for sentence in self.run.result(stage)["warnings"]:
            self.progress.note(f"warning {sentence}")

    def _nothing_to_train_on(self, iteration: int) -> str:
        folder = f"iter-{iteration:02d}"
        drawn = f"{folder}/estep"
        advice = f"{health.advice(self.run.result(drawn))}; " if self.run.finished(drawn) else ""
        return (
            f"iteration {iteration}: no rationale was accepted, so there is nothing to train on: {advice}"
            f"see {self.run.path / folder / 'samples.jsonl'} for what the model wrote"
        )

    def _state_is_needed(self, iteration: int) -> bool:
        """Whether a later M-step goes on from more than the saved model holds: float32 masters, AdamW's moments."""
        continues = self.config.run.init == "previous" and iteration < self.config.run.iterations
        return (continues or self.mstep.lora is not None) and self.mstep.state_needed

    def _check_lengths(self) -> tuple[int, int]:
        """Refuse prompts that leave no room for an answer now, rather than after hours.

        Returns the tokens of the longest prompt and the most new ones: what the generator must have room for.
        """
        longest = 0
        task, sampler = self.task, self.config.sampler
        wordings = [None] if sampler.name == "rsm" else [None, sampler.hint]  # rsm never shows a hint
        for section, new, questions, hints in (
            ("eval", self.config.eval.max_new_tokens, task.validation + task.test, [None]),
            ("sampler", sampler.max_new_tokens, task.train, wordings),
        ):
            for question, hint in product(questions, hints):
                length = len(encode_prompt(self.tokenizer, question, hint))
                if length + new > self.generator.max_length:
                    raise UserError(
                        f"question {question.id!r}: its prompt of {length} tokens does not leave {new} of the "
                        f"model's {self.generator.max_length} positions; lower {section}.max_new_tokens"
                    )
                longest = max(longest, length)
        return longest, max(self.config.eval.max_new_tokens, sampler.max_new_tokens)

    def _skip(self, stage: str) -> bool:
        if self.run.finished(stage):
            self.progress.note(f"{stage}  done before, not repeated")
        return self.run.finished(stage)

    def _line(self, iteration: int, what: str, total: int | None = None) -> Any:
        name = f"iteration {iteration}/{self.config.run.iterations}" if iteration else "base model"
        return self.progress.stage(f"{name}  {what}", total)

    def _valid_share(self, rows: Sequence[Mapping[str, Any]]) -> float | None:
        """On the toy a program can check each step: the share of the kept rationales in which all of them hold."""
        if self.task.name != "toy" or not rows:
            return None
        from minem.data.toy.check import valid_steps

        questions = {question.id: question for question in self.task.train}
        return sum(valid_steps(row["text"], questions[row["id"]]) for row in rows) / len(rows)


def _facts(row: Mapping[str, Any]) -> dict[str, str | float]:
    """What the line of an M-step shows of a step's metrics."""
    facts = {"loss": row["loss"], "grad_norm": row["grad_norm"], "lr": row["lr"]}
    facts |= {"tokens_per_s": row["tokens_per_second"]}
    if row["mfu"] is not None:
        facts["MFU"] = percent(row["mfu"])
    peak = next(value for key, value in row.items() if key.startswith("peak_"))
    return facts | {"peak_memory": f"{peak / 1e9:.2f} GB"}
