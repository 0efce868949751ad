"""A sample: one attempt at a question, as samples.jsonl keeps it and the M-step trains on it.

head -1 runs/toy.rsm8.toy-llama.s0/iter-01/samples.jsonl
"""

from dataclasses import dataclass
from typing import Literal

Prompt = Literal["plain", "hinted"]
Status = Literal["accepted", "wrong", "unparsed", "truncated"]


@dataclass(frozen=True)
class Sample:
    """A rationale with its answer; the fields are the columns of samples.jsonl. Log-probabilities are sums, in nats."""

    id: str  # of the question
    iteration: int
    attempt: int  # from 1
    prompt: Prompt  # it was drawn from
    token_ids: list[int]  # as drawn, EOS included
    logprob_q: float | None  # under the prompt and policy it was drawn with
    logprob_plain: float | None  # under the plain prompt and theta_old; None if not computed
    text: str
    answer: str | None  # None if the text states none
    gold: str
    status: Status
    leak: bool  # a hinted rationale that cites the hint
