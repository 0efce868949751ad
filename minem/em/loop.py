"""EM for reasoning: sample rationales, keep the correct ones, train on them, repeat.

    minem train --sampler rsm --budget 8

    E-step   draw (z, y) ~ q(. | x, y*) with the current weights; keep the draws whose answer y is y*
    M-step   maximise sum_i w_i log pi(z_i, y_i | x_i) over the kept draws, always from the plain prompt

Each step is a *stage* (runs/stages.py): `run.do` skips it if it is finished, and minds ranks, progress and files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from minem.config import RunSection
from minem.data.tasks import Question, Task
from minem.em import diagnostics, evaluate, warnings
from minem.em.checkpoints import Checkpoints, export, export_bytes, make_room
from minem.em.estep import EStep, minibatch
from minem.em.mstep import MStep
from minem.em.sample import Sample
from minem.em.weighting import make_examples
from minem.runs.stages import Run, Stage, row_bytes


@dataclass
class Experiment:
    """A model, a task and a sampler; `run` keeps what they produce. `minem.train.build` puts them together."""

    section: RunSection
    task: Task
    estep: EStep  # a sampler and the generator, which shares its weights with `mstep`
    mstep: MStep
    evaluation: evaluate.Evaluation
    diagnosis: diagnostics.Diagnosis
    model_id: str
    card: Callable[[int], str]  # the model card after an iteration
    run: Run = field(init=False)  # set when its directory is open

    def train(self, select: Callable[[int], Sequence[Sample] | None] = lambda iteration: None) -> None:
        """All iterations, from wherever the run stands. select: what to train on; None stands for all kept samples."""
        last = self.section.iterations
        self.evaluate(0, "validation", self.task.validation)
        self.evaluate(0, "test", self.task.test)
        for iteration in range(1, last + 1):
            self.e_step(iteration)
            self.diagnose(iteration)
            self.m_step(iteration, select(iteration))
            self.evaluate(iteration, "validation", self.task.validation)
        self.evaluate(last, "test", self.task.test)

    def e_step(self, iteration: int) -> None:
        """Sample rationales with the weights of the previous iteration; keep those that the filter accepts."""
        questions = minibatch(self.task.train, self.section.questions_per_iteration, self.section.seed, iteration)

        def sample(stage: Stage) -> None:
            earlier = (self.run.read(i, "samples.jsonl", Sample) for i in range(iteration - 1, 0, -1))
            self.estep.begin(iteration, questions, earlier)
            samples, counts = stage.in_blocks(questions, self.estep, Sample)
            kept = [sample for sample in samples if self.estep.keeps(sample)]
            stage.write("samples.jsonl", samples)
            stage.write("accepted.jsonl", kept)
            found = self.estep.summary(self.task, samples, kept, counts)
            stage.report(**found, warnings=warnings.of_draws(found))

        writes = 3 * row_bytes(len(questions), self.estep.section.max_new_tokens)
        self.run.do(iteration, "estep", sample, len(questions), writes)
        self.run.discard(iteration, *(f"samples.{n}.jsonl" for n in self.run.parts(iteration, "estep")))

    def m_step(self, iteration: int, samples: Sequence[Sample] | None = None) -> None:
        """Train on the kept samples of this iteration (or on `samples`) and export the model."""
        continues = self.section.init == "previous"  # after the last iteration too: more may be wanted later

        def train(stage: Stage) -> None:
            kept = self.run.read(iteration, "accepted.jsonl", Sample) if samples is None else samples
            warnings.stop_if_empty(kept, self.run, iteration)
            if self.section.init == "base":
                self.mstep.restart()
            make_room(self.estep.generators["plain"], self.mstep)
            checkpoints = Checkpoints(stage, self.mstep, self.section.checkpoint_minutes)
            examples = make_examples(kept, self.task, self.estep.prompts, self.mstep.config)
            found = self.mstep.run(examples, self.section.seed, iteration, checkpoints.after_step)
            export(stage, self.mstep, self.estep.prompts.tokenizer, self.model_id, self.card(iteration), continues)
            stage.report(**found, warnings=warnings.of_training(self.mstep.losses, found, iteration, self.run.results))

        self.run.do(iteration, "mstep", train, writes=export_bytes(self.mstep))
        self.run.discard(iteration, *(f"checkpoint.{n}" for n in self.run.parts(iteration, "mstep")))
        self.run.discard(iteration - 1, "state", *(["model", "adapter"] if self.section.keep == "last" else []))

    def diagnose(self, iteration: int) -> None:
        """Hinted draws on a few fixed questions, a quarter of the E-step at most: p-hat, effective sample size."""
        estep = self.run.result(iteration, "estep")

        def look(stage: Stage) -> None:
            draw = partial(self.diagnosis.draw, iteration, estep, self.run.ranks.size)
            draws = stage.sharded(self.diagnosis.questions, draw)
            kept = self.run.read(iteration, "accepted.jsonl", Sample)
            first = self.run.results.get("iter-01/diagnostics")
            found = self.diagnosis.summary(draws, kept, self.task, first)
            stage.show(**diagnostics.facts(found))
            stage.report(**found, warnings=warnings.of_diagnostics(found, first))

        if self.diagnosis.questions and estep["kept"]:
            self.run.do(iteration, "diagnostics", look, self.diagnosis.total)

    def evaluate(self, iteration: int, split: str, questions: Sequence[Question], known: Sequence[dict] = ()) -> None:
        """Greedy accuracy of the model after `iteration` (0: the base model), and its accuracy at temperature 1."""

        def measure(stage: Stage) -> None:
            answers = stage.sharded(questions, partial(self.evaluation.answers, known=known))
            found = evaluate.summarise_answers(questions, answers, self.evaluation.section.samples)
            stage.show(**evaluate.facts(found))
            stage.write(f"eval.{split}.jsonl", evaluate.greedy_rows(questions, answers))
            stage.report(**found, warnings=warnings.of_answers(found))

        writes = row_bytes(len(questions), self.evaluation.section.max_new_tokens)
        self.run.do(iteration, f"eval.{split}", measure, self.evaluation.total(questions), writes)
