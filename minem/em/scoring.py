"""Log-probabilities by the forward pass of training (teacher forcing), and whether the generator's agree with them.

    minem train --json | tail -1                       # logprob_difference and policy_kl of the first E-step

A generator that decodes one token at a time from a cache and a trainer that reads whole sequences at once round
differently. If one of them is wrong, EM trains on samples of another model, and nothing else shows it. So the first
E-step of a run compares some of its draws with the M-step's own forward pass, and the metrics keep the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minem.em.packing import Example, best_fit_decreasing, pack
from minem.errors import GuardError
from minem.generation.request import Completion
from minem.model.decoder import Model

DRAWS = 64  # that are compared
LARGEST_DIFFERENCE = 1e-4  # nats, of any token, in float32
LARGEST_KL = 0.005  # nats a token, on average, in bfloat16


@dataclass(frozen=True)
class Agreement:
    """How far generator and trainer are apart over some sampled tokens, in nats."""

    tokens: int
    difference: float  # the largest of any token
    kl: float  # mean over tokens of KL(generator || trainer): r - 1 - log r, r the ratio of the two (Schulman's k3)

    def require(self, dtype: torch.dtype) -> None:
        """Raises GuardError if a model of this dtype should do better. NaN is not better."""
        if dtype == torch.float32:
            holds, limit = self.difference <= LARGEST_DIFFERENCE, f"{LARGEST_DIFFERENCE:g} a token in float32"
        else:
            holds, limit = self.kl <= LARGEST_KL, f"{LARGEST_KL:g} of mean KL in {str(dtype).removeprefix('torch.')}"
        if not holds:
            raise GuardError(
                f"the generator and the trainer disagree on the log-probabilities of {self.tokens} drawn tokens: "
                f"by {self.difference:.3g} at most and a mean KL of {self.kl:.3g}, beyond {limit}; "
                "the samples would not be those of the model that is trained"
            )


def agreement(model: Model, draws: Sequence[Completion], pack_tokens: int) -> Agreement:
    """Compare the draws' own log-probabilities with those of the trainer's forward pass.

    Args:
        draws: completions of this very model, with their requests; empty ones are left out.
        pack_tokens: most tokens of a pass (memory only).
    """
    drawn = [draw for draw in draws if draw.request is not None and draw.token_ids]
    examples = [Example("", d.request.prompt_ids, d.token_ids) for d in drawn if d.request is not None]
    differences = [
        trainer - generator
        for draw, (logprobs, _) in zip(drawn, score(model, examples, pack_tokens), strict=True)
        for trainer, generator in zip(logprobs, draw.logprobs, strict=True)
    ]
    n = len(differences)
    return Agreement(
        tokens=n,
        difference=max(map(abs, differences), default=0.0),
        kl=math.fsum(math.expm1(d) - d for d in differences) / max(1, n),
    )


@torch.no_grad()
def score(model: Model, examples: Sequence[Example], pack_tokens: int) -> list[tuple[list[float], list[float]]]:
    """Log-probability and entropy (nats) of the policy at each supervised token: the forward pass of training, alone.

    pack_tokens: most tokens of a pass (memory only).
    """
    scored: dict[int, tuple[list[float], list[float]]] = {}
    for members in best_fit_decreasing([len(example) for example in examples], pack_tokens):
        packed = pack([examples[i] for i in members]).to(model.device)
        _, logprobs, entropies = model(
            packed.input_ids, lengths=packed.lengths, rows=packed.rows, targets=packed.targets
        )
        sizes = [len(examples[i].token_ids) for i in members]
        for i, own, spread in zip(members, logprobs.split(sizes), entropies.split(sizes), strict=True):
            scored[i] = own.tolist(), spread.tolist()
    return [scored[i] for i in range(len(examples))]
