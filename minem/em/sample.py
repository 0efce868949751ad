"""The central noun: one rationale that was drawn for a question, and what became of it.

    head -1 runs/first-look/iter-01/samples.jsonl      # one as a row of JSON

The E-step makes samples, the filter keeps some of them, the M-step trains on those, and a report shows them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Sample:
    """One draw for the question `id`; log-probabilities are sums over its tokens, in nats."""

    id: str
    iteration: int
    attempt: int  # counted from 1
    prompt: Literal["plain", "hinted"]  # what it was drawn with
    token_ids: list[int]  # as drawn, EOS included
    logprob_q: float | None  # under the prompt and the policy that it was drawn with
    logprob_plain: float | None  # under the plain prompt and the policy at the start of the iteration
    text: str
    answer: str | None  # that it states
    gold: str
    status: str  # "accepted" | "wrong" | "unparsed" | "truncated"
    leak: bool  # a hinted draw that cites the hint

    def row(self) -> dict[str, Any]:
        """The row of samples.jsonl."""
        return dict(vars(self))

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Sample:
        """What `row` made of one."""
        return cls(**row)
