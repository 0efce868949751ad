"""Log-probabilities by the forward pass of training (teacher forcing), and whether the generator's agree with them.

    minem train --json | tail -1                       # logprob_difference and policy_kl of the first E-step

A generator that decodes one token at a time from a cache and a trainer that reads whole sequences at once round
differently. If one of them is wrong, EM trains on samples of another model, and nothing else shows it. So the first
E-step of a run compares some of its draws with the M-step's own forward pass, and the metrics keep the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minem.em.packing import Example, best_fit_decreasing, pack
from minem.errors import GuardError
from minem.generation.request import Completion
from minem.model.decoder import Model
from minem.statistics import mean

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
    """Compare the log-probabilities of draws of this model, at least one, with those of the trainer's forward pass."""
    examples = [Example("", draw.request.prompt_ids, draw.token_ids) for draw in draws if draw.request is not None]
    differences = [
        trainer - generator
        for draw, (logprobs, _) in zip(draws, score(model, examples, pack_tokens), strict=True)
        for trainer, generator in zip(logprobs, draw.logprobs, strict=True)
    ]
    kl = mean([math.expm1(difference) - difference for difference in differences])
    return Agreement(tokens=len(differences), difference=max(map(abs, differences)), kl=kl)


@torch.no_grad()
def score(model: Model, examples: Sequence[Example], pack_tokens: int) -> list[tuple[list[float], list[float]]]:
    """Log-probability and entropy (nats) of the policy at each supervised token, by the forward pass of training."""
    scored: dict[int, tuple[list[float], list[float]]] = {}
    for members in best_fit_decreasing([len(example) for example in examples], pack_tokens):
        packed = pack([examples[i] for i in members], model.device)
        _, logprobs, entropies = model(**packed.arguments)
        sizes = [len(examples[i].token_ids) for i in members]
        for i, own, spread in zip(members, logprobs.split(sizes), entropies.split(sizes), strict=True):
            scored[i] = own.tolist(), spread.tolist()
    return [scored[i] for i in range(len(examples))]
