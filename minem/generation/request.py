"""The generator's input and output: SamplingParams, Request, Completion.

minem generate --prompt "..."
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

from minem.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How to draw. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch those filters off.

    EOS is not drawn, and stop texts are not looked for, before min_new_tokens.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        rules = [
            ("n", 1 <= self.n <= 1_000_000, "at least 1 and at most 1000000"),
            ("temperature", self.temperature == 0 or 1e-3 <= self.temperature <= 1e3, "0 (greedy) or 0.001 to 1000"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (off) or a positive whole number below 2^31"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
            ("stop", all(self.stop), "texts of at least one character"),
        ]
        for name, holds, right in rules:
            if not holds:
                raise UserError(f"{name} = {getattr(self, name)!r} must be {right}")


@dataclass(eq=False)
class Request:
    """One draw from one prompt. `params.n` and `params.seed` are ignored: they are for `Generator.generate`.

    `seed` keys the draw's random stream (`stream_seed`); `tag` is the caller's own and comes back untouched.
    """

    prompt_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    tag: Any = None


@dataclass(frozen=True)
class Completion:
    """One finished draw."""

    token_ids: list[int]  # includes the final EOS
    text: str  # without special tokens, cut before a stop text
    logprobs: list[float]  # of the raw model, at temperature 1, before any mask
    finish_reason: Literal["stop", "length", "cancelled"]
    proposal_logprobs: list[float] = field(default_factory=list, repr=False)  # as drawn: tempered and truncated
    request: Request | None = field(default=None, repr=False)


def stream_seed(*parts: object) -> int:
    """A stable 63-bit seed for one draw's random stream, from the values that identify the draw."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
