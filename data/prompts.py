"""Prompts: a question as chat messages, in the words of a prompt set, and as the token ids that a model reads.

    minem train --prompt star            # a built-in set (data/prompt_sets), or a FILE.toml of your own

A set has one template for the plain prompt and one for each named hint, which shows the answer, and it may have shots:
worked examples that come before the question. Templates are jinja2's, with the variables of VARIABLES. Every prompt
asks for a last line `The best answer is X`, which minem.data.verdict reads. The wordings are ours.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minem.config import TaskSection
from minem.data.rows import LETTERS
from minem.data.tasks import Question
from minem.errors import UserError, one_of
from minem.files import read_toml
from minem.model.chat_template import render, variables
from minem.model.tokenizer import Tokenizer

ANSWER_LINE = "The best answer is"
FOLDER = Path(__file__).parent / "prompt_sets"
OF_TASK = {"toy": "toy", "gsm8k": "gsm8k", "word-problems": "gsm8k"}  # of other tasks: default
VARIABLES = {"question", "options", "labels", "gold", "gold_text", "context"}

Shots = Literal["none", "proposal", "always"]
Message = dict[str, str]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", str_min_length=1)


class Shot(_Table):
    """A worked example; its options, if it has some, are labelled A, B, C, ..."""

    question: str
    options: list[str] = Field([], max_length=len(LETTERS))
    gold: str
    rationale: str


class PromptSet(_Table):
    """The words that questions are put in, as a file of data/prompt_sets has them."""

    system: str | None = None
    plain: str
    hinted: dict[str, str] = {}
    answer: str = f"{ANSWER_LINE} {{{{ gold }}}}"  # the last line of a shot
    shots: list[Shot] = []
    chat_template_kwargs: dict[str, Any] = {}  # more variables for the model's chat template

    def messages(self, question: Question, hint: str | None = None, shots: bool = False) -> list[Message]:
        """The chat that asks a question, hinted if `hint` names a wording; with shots, those of its kind."""
        template = self.plain if hint is None else self.hinted[hint]
        chat = [{"role": "system", "content": self.system}] if self.system is not None else []
        fitting = [shot for shot in self.shots if bool(shot.options) == bool(question.options)]
        if shots and not fitting:
            raise UserError(f"the prompt set has no shots {'with' if question.options else 'without'} options")
        for shot in fitting if shots else ():
            labels = tuple(LETTERS[: len(shot.options)])
            example = Question("", shot.question, tuple(shot.options), labels, shot.gold)
            worked = f"{shot.rationale}\n{_filled(self.answer, example)}".strip()
            chat.append({"role": "user", "content": _filled(template, example)})
            chat.append({"role": "assistant", "content": worked})
        return [*chat, {"role": "user", "content": _filled(template, question)}]

    @property
    def sha256(self) -> str:
        """A fingerprint of all words."""
        return hashlib.sha256(json.dumps(self.model_dump(), default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Prompts:
    """Questions as token ids, for one model. Shots stand in no prompt, in those that are drawn from, or in all.

    hint: the wording of hinted prompts, a name of `words.hinted`. stop: texts that end an answer. special_tokens: let
    control tokens in a question act as such; else a space in each keeps it text.
    """

    tokenizer: Tokenizer
    words: PromptSet
    shots: Shots = "none"
    hint: str = "forward"
    stop: tuple[str, ...] = ()
    special_tokens: bool = False

    def trained(self, question: Question) -> list[int]:
        """The prompt that the M-step trains on and that an evaluation asks."""
        return self._encode(question, None, self.shots == "always")

    def drawn(self, question: Question, hinted: bool) -> list[int]:
        """The plain or hinted prompt that the E-step draws from."""
        return self._encode(question, self.hint if hinted else None, self.shots != "none")

    @property
    def sha256(self) -> str:
        """A fingerprint of the words, where shots stand and what ends an answer; of the plain prompts alone."""
        return hashlib.sha256(json.dumps([self.words.sha256, self.shots, self.stop]).encode()).hexdigest()

    def escaped(self, question: Question) -> Question:
        """The question as prompts show it: without control tokens, so that no row can end the user's turn."""
        if self.special_tokens:
            return question
        text, context, gold, *options = (
            self.tokenizer.control_tokens.sub(lambda found: f"{found[0][0]} {found[0][1:]}", part)
            for part in (question.text, question.context, question.gold, *question.options)
        )
        return replace(question, text=text, context=context, gold=gold, options=tuple(options))

    def _encode(self, question: Question, hint: str | None, shots: bool) -> list[int]:
        try:
            chat = self.words.messages(self.escaped(question), hint, shots)
            if self.tokenizer.chat_template is not None:
                return self.tokenizer.chat(chat, self.words.chat_template_kwargs)
            return self.tokenizer.encode(as_text(chat))
        except UserError as error:
            raise UserError(f"question {question.id!r}: {error}") from error


def as_text(chat: list[Message]) -> str:
    """A chat for a base model, which has no template: answers follow their questions, a blank line ends each."""
    return "".join(message["content"] + ("\n" if message["role"] == "user" else "\n\n") for message in chat)


def load_prompts(name: str | None, task: str = "") -> PromptSet:
    """A built-in prompt set by name, your own by its path, FILE.toml, or the task's. UserError names the wrong key."""
    name = name or OF_TASK.get(task, "default")
    built_in = {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
    if name not in built_in and not name.endswith(".toml"):
        raise UserError(f"task.prompt is {name!r}; it must be {one_of(name, built_in, 'or a FILE.toml')}")
    path = built_in.get(name) or Path(name)
    try:
        words = PromptSet.model_validate(read_toml(path))
    except ValidationError as error:
        first = max(error.errors(), key=lambda found: found["type"] == "extra_forbidden")  # a misspelt key comes first
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    _check(words.plain, f"{path}: plain", VARIABLES - {"gold", "gold_text"})  # which it must not show
    for key, template in {"answer": words.answer, **words.hinted}.items():
        _check(template, f"{path}: {key}", VARIABLES)
    for number, shot in enumerate(words.shots, start=1):
        if shot.options and shot.gold not in LETTERS[: len(shot.options)]:
            found = f"gold is {shot.gold!r}; it must be the label of an option, like A"
            raise UserError(f"{path}: shots, number {number}: {found}")
    return words


def make_prompts(tokenizer: Tokenizer, section: TaskSection, hint: str | None, stop: Sequence[str]) -> Prompts:
    """The prompts of a task; hint: None if none is hinted. UserError if the set lacks the hint or the shots."""
    words = load_prompts(section.prompt, section.name)
    if hint is not None and hint not in words.hinted:
        found = one_of(hint, words.hinted) if words.hinted else "a hint, and the prompt set has none"
        raise UserError(f"sampler.hint is {hint!r}; it must be {found}")
    if section.shots != "none" and not words.shots:
        raise UserError(f"task.shots is {section.shots!r}, but the prompt set has no shots; it must be none")
    return Prompts(tokenizer, words, section.shots, hint or "", tuple(stop), section.special_tokens)


def _check(template: str, where: str, known: set[str]) -> None:
    try:
        unknown = variables(template) - known
    except UserError as error:
        raise UserError(f"{where} {error}") from error
    if unknown:
        raise UserError(f"{where} has no variable {min(unknown)}; it must be {one_of(min(unknown), sorted(known))}")


def _filled(template: str, question: Question) -> str:
    gold_text = dict(zip(question.labels, question.options, strict=True)).get(question.gold, question.gold)
    values = {"question": question.text, "options": question.options, "labels": question.labels}
    values |= {"context": question.context}
    if question.context and "context" not in variables(template):
        raise UserError(
            f"the template {' '.join(template.split())[:60]!r} leaves out {{{{ context }}}}, which rows have"
        )
    try:
        return render(template, values | {"gold": question.gold, "gold_text": gold_text})
    except UserError as error:
        raise UserError(f"the template {' '.join(template.split())[:60]!r} {error}") from error
