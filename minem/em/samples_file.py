"""Samples from a file that anybody may have made, checked row by row before the M-step trains on them.

    minem train --samples FILE.jsonl

A row needs `id`, a training question of the task, and one of these; what else samples.jsonl has is optional:

    token_ids    the ids that were drawn, in the model's own vocabulary
    text         the answer; the model's tokenizer encodes it, with EOS after it where finish_reason is "stop"
    messages     a chat that ends with the assistant's answer, the same as `text`
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minem.data.prompts import Prompts
from minem.data.tasks import Task
from minem.em.sample import Sample
from minem.errors import UserError, shown
from minem.files import read_rows
from minem.model.tokenizer import Tokenizer

MEANINGS = {"logprob_plain": "the plain prompt", "logprob_q": "the prompt they were drawn with"}


def read_samples(
    file: Path, task: Task, prompts: Prompts, max_length: int, vocab_size: int, weights: str, drop_leaks: bool
) -> list[Sample]:
    """The rows with status "accepted", and those without a status; with `drop_leaks` no rows that are marked as leaks.

    max_length, vocab_size: of the model, in tokens. weights: as `mstep.weights`. UserError names a bad row.
    """
    questions, tokenizer = {question.id: question for question in task.train}, prompts.tokenizer
    samples = []
    for number, row in enumerate(read_rows(file), start=1):
        if row.get("status", "accepted") != "accepted" or (drop_leaks and row.get("leak")):
            continue
        where, question = f"{file}, row {number}", questions.get(str(row.get("id")))
        if question is None:
            raise UserError(f"{where}: id {row.get('id')!r} is no training question of {task.name}")
        ids = row["token_ids"] if "token_ids" in row else _encoded(row, tokenizer, where)
        if not (isinstance(ids, list) and ids and all(type(i) is int for i in ids)):
            raise UserError(f"{where}: token_ids must be a list of the ids that were drawn")
        prompt = prompts.trained(question)
        if outside := [i for i in (*ids, *prompt) if not 0 <= i < vocab_size]:
            reason = f"outside the model's vocabulary of {vocab_size}; the samples come from another tokenizer"
            raise UserError(f"{where}: token id {outside[0]} is {reason}")
        text = row.get("text")
        spelt = " ".join(tokenizer.decode(ids).split())  # with a stop text, which the text lacks
        if "token_ids" in row and isinstance(text, str) and not spelt.startswith(" ".join(text.split())):
            raise UserError(f"{where}: token_ids do not spell its text; they come from another tokenizer")
        if len(prompt) + len(ids) > max_length:
            raise UserError(f"{where}: {len(ids)} token ids and their prompt exceed {max_length} positions")
        logprobs = {name: _logprob(row, name, where) if weights == "importance" else None for name in MEANINGS}
        samples.append(
            Sample(
                id=question.id,
                iteration=1,
                attempt=number,
                prompt="plain",
                token_ids=ids,
                **logprobs,
                text=tokenizer.decode(ids),
                answer=None,
                gold=question.gold,
                status="accepted",
                leak=bool(row.get("leak")),
            )
        )
    return samples


def _encoded(row: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> list[int]:
    """The token ids of a row's text, or of the assistant's last message."""
    text, chat = row.get("text"), row.get("messages")
    last = chat[-1] if text is None and isinstance(chat, list) and chat else {}
    if isinstance(last, dict) and last.get("role") == "assistant":
        text = last.get("content")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} needs token_ids, a text, or messages of which the assistant's answer is the last")
    try:
        ids = tokenizer.encode(text, add_special_tokens=False)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if early := [i for i in ids[:-1] if i in tokenizer.eos_ids]:
        token = tokenizer.decode(early[:1], skip_special_tokens=False)
        raise UserError(f"{where}: its text has {token!r}, which ends an answer, before its end")
    stopped = row.get("finish_reason") == "stop" and tokenizer.eos_ids.isdisjoint(ids[-1:])
    return ids if not stopped or tokenizer.eos_id is None else [*ids, tokenizer.eos_id]


def _logprob(row: Mapping[str, Any], field: str, where: str) -> float:
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise UserError(
            f'{where}: {field} is {shown(value)}; mstep.weights = "importance" needs the log-probability of the '
            f"drawn tokens under {MEANINGS[field]} there, a finite number"
        )
    return float(value)
