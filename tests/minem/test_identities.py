"""The mathematics of EM, proved exactly: every outcome of every attempt of a policy small enough to list.

The policy writes at most three tokens of {A, B} and EOS, from a table of logits in float64. Nothing here is sampled:
minem's own samplers are asked what to try next after every possible history, the gradient of each kept sample is
minem's own M-step's, and expectations are sums over all histories. Below, p is the probability that a plain draw is
right, a that a hinted draw is right, g the unnormalised gradient of the M-step at the policy that drew.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch

from minem.config import MStepSection
from minem.em.mstep import MStep
from minem.em.packing import Example, Step, pack
from minem.em.sample import Sample
from minem.em.samplers import Attempt, make_sampler
from minem.em.weighting import weigh

EOS, A, B, PLAIN, HINTED = range(5)
LONGEST = 3
QUESTION = SimpleNamespace(id="q", text="?", options=("A", "B"), labels=("A", "B"), gold="A", subject="")
PREFIXES = [prefix for n in range(LONGEST) for prefix in product((A, B), repeat=n)]
# Everything that a draw can be: ended by EOS within three tokens, or cut off.
OUTCOMES = [(*prefix, EOS) for prefix in PREFIXES] + list(product((A, B), repeat=LONGEST))

Outcome = tuple[int, ...]
History = list[tuple[str, Outcome]]


def accepted(outcome: Outcome) -> bool:
    """The filter: it ended, and the last token before the end is the right answer (A). `AAA` was cut off: rejected."""
    return outcome[-1] == EOS and outcome[-2:-1] == (A,)


class TablePolicy(torch.nn.Module):
    """A logit for each (prompt, prefix, next token); speaks the interface of minem's model."""

    def __init__(self, seed: int):
        super().__init__()
        self.device, self.stored_dtype = torch.device("cpu"), torch.float64
        noise = torch.Generator().manual_seed(seed)
        tables = torch.randn(2, len(PREFIXES), 3, generator=noise, dtype=torch.float64)
        self.table = torch.nn.Parameter(tables[0])
        # The hinted prompt shares the parameters, and shifts them: a gradient through it would be a wrong one.
        self.shift = torch.nn.Parameter(tables[1], requires_grad=False)

    def forward(self, input_ids, lengths, rows, targets, token_weights):
        logits = []
        for sequence in input_ids.split(lengths):
            prompt, *written = sequence.tolist()
            for n in range(len(written) + 1):
                at = PREFIXES.index(tuple(written[:n]))
                logits.append(self.table[at] + (self.shift[at] if prompt == HINTED else 0))
        logprobs = torch.stack(logits)[rows].log_softmax(-1)
        chosen = logprobs.gather(1, targets[:, None]).squeeze(1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return -(token_weights * chosen).sum(), chosen.detach(), entropy.detach()

    def logprob(self, prompt: int, outcome: Outcome) -> torch.Tensor:
        packed = pack([Example("q", [prompt], list(outcome))])
        loss, _, _ = self(packed.input_ids, packed.lengths, packed.rows, packed.targets, packed.token_weights)
        return -loss

    def probabilities(self, prompt: int) -> dict[Outcome, float]:
        with torch.no_grad():
            return {outcome: float(self.logprob(prompt, outcome).exp()) for outcome in OUTCOMES}


class World:
    """A policy, the exact chances of its draws, and the exact gradients to which expectations are compared."""

    def __init__(self, seed: int):
        self.policy = TablePolicy(seed)
        self.plain = self.policy.probabilities(PLAIN)
        self.hinted = self.policy.probabilities(HINTED)
        self.p = sum(chance for outcome, chance in self.plain.items() if accepted(outcome))
        self.a = sum(chance for outcome, chance in self.hinted.items() if accepted(outcome))
        self.mstep = MStep(self.policy, MStepSection())
        self.g = {outcome: self._sample_gradient(outcome) for outcome in OUTCOMES if accepted(outcome)}

    def _sample_gradient(self, outcome: Outcome) -> torch.Tensor:
        """What minem's M-step adds for one kept sample: grad log pi(outcome | plain prompt)."""
        self.policy.table.grad = None
        self.mstep.accumulate([Example("q", [PLAIN], list(outcome))], Step(0, ((0,),)), divisor=1.0)
        return -self.policy.table.grad

    def grad_accuracy(self, log: bool = False) -> torch.Tensor:
        """grad p, or grad log p: p is summed over all right draws and differentiated, with no sample in sight."""
        p = torch.stack([self.policy.logprob(PLAIN, o).exp() for o in OUTCOMES if accepted(o)]).sum()
        return torch.autograd.grad(p.log() if log else p, self.policy.table)[0]

    def hinted_gradient(self) -> torch.Tensor:
        """E_q[grad log pi(z | plain)]: over the hinted draws that were accepted."""
        surrogate = sum(
            chance / self.a * self.policy.logprob(PLAIN, outcome)
            for outcome, chance in self.hinted.items()
            if accepted(outcome)
        )
        return torch.autograd.grad(surrogate, self.policy.table)[0]

    def histories(self, name: str, budget: int, draws: str = "first") -> Iterator[tuple[float, History]]:
        """Every sequence of attempts that the sampler can make for the question, with its probability."""
        sampler = make_sampler(name, budget, draws)
        chances = {"plain": list(self.plain.items()), "hinted": list(self.hinted.items())}
        verdicts = {
            (prompt, o): Attempt(
                prompt, accepted(o), answer=None, status="accepted" if accepted(o) else "wrong", text=""
            )
            for prompt in chances
            for o in OUTCOMES
        }

        def extend(chance: float, attempts: list[Attempt], history: History) -> Iterator[tuple[float, History]]:
            prompt = sampler.next(QUESTION, attempts)
            if prompt is None:
                yield chance, history
                return
            for outcome, likely in chances[prompt]:
                if likely > 0:
                    attempt = verdicts[prompt, outcome]
                    yield from extend(chance * likely, [*attempts, attempt], [*history, (prompt, outcome)])

        yield from extend(1.0, [], [])

    def expected_gradient(self, name: str, budget: int, draws: str = "first", mean: bool = False) -> torch.Tensor:
        """E[g] over all histories, where g sums (or averages) over the accepted draws of a history."""
        weights: Counter[Outcome] = Counter()
        for chance, history in self.histories(name, budget, draws):
            kept = [outcome for _, outcome in history if accepted(outcome)]
            for outcome in kept:
                weights[outcome] += chance / (len(kept) if mean else 1)
        return sum((weight * self.g[outcome] for outcome, weight in weights.items()), torch.zeros(len(PREFIXES), 3))

    def sample(self, prompt: str, outcome: Outcome) -> Sample:
        """An accepted draw, as `minem.em.weighting.weigh` takes it."""
        log_q = math.log({"plain": self.plain, "hinted": self.hinted}[prompt][outcome])
        log_p = math.log(self.plain[outcome])
        return Sample("q", 1, 1, prompt, list(outcome), log_q, log_p, "", "A", "A", "accepted", False)

    def weighed_gradient(self, name: str, budget: int, kind: str) -> torch.Tensor:
        """E[g] with draws="all", over all histories, each weighed as minem weighs what it keeps."""
        weights: Counter[Outcome] = Counter()
        for chance, history in self.histories(name, budget, "all"):
            kept = [(prompt, outcome) for prompt, outcome in history if accepted(outcome)]
            found = weigh([self.sample(*draw) for draw in kept], kind)
            for (_, outcome), weight in zip(kept, found, strict=True):
                weights[outcome] += chance * weight
        return sum((weight * self.g[outcome] for outcome, weight in weights.items()), torch.zeros(len(PREFIXES), 3))

    def hinted_by_counts(self, k: int, kind: str) -> torch.Tensor:
        """`weighed_gradient("pps", k, kind)` for many draws: over all counts of outcomes, not all histories."""
        right = [outcome for outcome in OUTCOMES if accepted(outcome)]
        samples = {outcome: self.sample("hinted", outcome) for outcome in right}
        weights: Counter[Outcome] = Counter()
        for counts in product(range(k + 1), repeat=len(right)):
            missed = k - sum(counts)
            if missed < 0 or missed == k:
                continue
            log_chance = math.lgamma(k + 1) - math.lgamma(missed + 1) + missed * math.log(1 - self.a)
            log_chance += sum(
                n * math.log(self.hinted[o]) - math.lgamma(n + 1) for o, n in zip(right, counts, strict=True)
            )
            kept = [o for o, n in zip(right, counts, strict=True) for _ in range(n)]
            found = weigh([samples[o] for o in kept], kind)
            for o, weight in zip(kept, found, strict=True):
                weights[o] += math.exp(log_chance) * weight
        return sum((weight * self.g[o] for o, weight in weights.items()), torch.zeros(len(PREFIXES), 3))

    def expectation(self, name: str, budget: int, draws: str, value: Callable[[list[float]], float]) -> float:
        """E[value(weights of the attempts)], with the importance weights w = r pi(z | plain) / q(z | hinted)."""
        total = 0.0
        for chance, history in self.histories(name, budget, draws):
            total += chance * value([self.plain[o] / self.hinted[o] if accepted(o) else 0.0 for _, o in history])
        return total


@pytest.fixture(params=[0, 1], ids=["policy0", "policy1"])
def world(request) -> World:
    return World(request.param)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12, check_dtype=False)


def test_the_enumeration_is_complete(world):
    assert sum(world.plain.values()) == pytest.approx(1, abs=1e-14)
    assert sum(world.hinted.values()) == pytest.approx(1, abs=1e-14)
    assert 0.02 < world.p < 0.9
    assert 0.02 < world.a < 0.9
    assert abs(world.p - world.a) > 0.01
    for name, draws in product(("rsm", "star", "pps"), ("first", "all")):
        assert sum(chance for chance, _ in world.histories(name, 3, draws)) == pytest.approx(1, abs=1e-12)


def test_1_one_plain_draw_gives_the_gradient_of_accuracy(world):
    expected = world.expected_gradient("rsm", 1)
    close(expected, world.grad_accuracy())
    close(expected, world.p * world.grad_accuracy(log=True))


@pytest.mark.parametrize("budget", [2, 4])
def test_2_rejection_sampling_draws_from_the_exact_posterior(world, budget):
    kept = 1 - (1 - world.p) ** budget
    share: Counter[Outcome] = Counter()
    for chance, history in world.histories("rsm", budget):
        if accepted(history[-1][1]):
            share[history[-1][1]] += chance
    assert sum(share.values()) == pytest.approx(kept, abs=1e-13)
    for outcome, chance in share.items():
        assert chance / kept == pytest.approx(world.plain[outcome] / world.p, abs=1e-13)
    close(world.expected_gradient("rsm", budget), kept * world.grad_accuracy(log=True))


@pytest.mark.parametrize("budget", [2, 4])
def test_2_keeping_every_accepted_draw(world, budget):
    close(world.expected_gradient("rsm", budget, "all"), budget * world.grad_accuracy())
    kept = 1 - (1 - world.p) ** budget
    close(world.expected_gradient("rsm", budget, "all", mean=True), kept * world.grad_accuracy(log=True))


@pytest.mark.parametrize("budget", [1, 3])
def test_2_question_weights_give_the_posterior_gradient_of_what_was_solved(world, budget):
    kept = 1 - (1 - world.p) ** budget
    expected = kept * world.grad_accuracy(log=True)
    close(world.weighed_gradient("rsm", budget, "question"), expected)
    # Plain draws at temperature 1 are the posterior's already.
    close(world.weighed_gradient("rsm", budget, "importance"), expected)
    close(world.weighed_gradient("rsm", budget, "equal"), budget * world.grad_accuracy())


def test_4_question_weights_do_not_turn_hinted_draws_into_posterior_ones(world):
    close(world.weighed_gradient("pps", 3, "question"), (1 - (1 - world.a) ** 3) * world.hinted_gradient())


def test_4_importance_weights_do_if_one_draw_of_each_kind_in_proportion_is_given(world):
    """With q spread evenly over the right outcomes and each drawn once, their weights are the posterior itself."""
    right = [outcome for outcome in OUTCOMES if accepted(outcome)]
    world.hinted = {o: 1 / len(right) if accepted(o) else 0.0 for o in OUTCOMES}
    found = weigh([world.sample("hinted", o) for o in right], "importance")
    assert found == pytest.approx([world.plain[o] / world.p for o in right], rel=1e-12)
    close(sum(w * world.g[o] for w, o in zip(found, right, strict=True)), world.grad_accuracy(log=True))


def test_4_importance_weights_approach_the_posterior_gradient_as_one_over_k(world):
    """Given that something was accepted; exactly, over all counts of K hinted draws. q covers the posterior here."""
    aim = world.grad_accuracy(log=True)

    def bias(k: int, kind: str) -> float:
        return float((world.hinted_by_counts(k, kind) / (1 - (1 - world.a) ** k) - aim).norm())

    close(world.hinted_by_counts(3, "importance"), world.weighed_gradient("pps", 3, "importance"))
    assert bias(1, "importance") == pytest.approx(bias(1, "question"), rel=1e-9)  # one draw has nothing beside it
    biases = {k: bias(k, "importance") for k in (1, 2, 4, 8, 16, 32)}
    assert all(biases[2 * k] < biases[k] for k in (1, 2, 4, 8, 16))
    assert biases[32] / biases[16] == pytest.approx(0.5, abs=0.1)
    assert bias(8, "question") == pytest.approx(bias(1, "question"), rel=1e-9)  # never gets any nearer


def test_3_plain_and_hinted_draws_are_weighed_together(world):
    """A question of star has either an accepted plain draw, of weight 1, or hinted ones."""
    hinted = world.hinted_by_counts(2, "importance")
    close(world.weighed_gradient("star", 3, "importance"), world.grad_accuracy() + (1 - world.p) * hinted)


@pytest.mark.parametrize("budget", [1, 2, 4])
def test_3_self_taught_reasoner(world, budget):
    saved = (1 - world.p) * (1 - (1 - world.a) ** (budget - 1))
    close(world.expected_gradient("star", budget), world.grad_accuracy() + saved * world.hinted_gradient())


def test_3_keeping_every_accepted_draw_still_hints_only_if_the_model_failed(world):
    hinted = (1 - world.p) * 2 * world.a
    close(world.expected_gradient("star", 3, "all"), world.grad_accuracy() + hinted * world.hinted_gradient())


@pytest.mark.parametrize("budget", [1, 3])
def test_4_prompt_posterior_sampling(world, budget):
    kept = 1 - (1 - world.a) ** budget
    close(world.expected_gradient("pps", budget), kept * world.hinted_gradient())


def test_3_and_4_differ_from_the_posterior_gradient(world):
    """The identities are no tautology: hinted draws do not, in general, pull as the exact posterior does."""
    apart = world.hinted_gradient() - world.grad_accuracy(log=True)
    assert apart.norm() > 0.05 * world.grad_accuracy(log=True).norm()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_5_importance_weights_of_k_fixed_draws_average_to_p(world, k):
    assert all(len(history) == k for _, history in world.histories("pps", k, "all"))
    assert world.expectation("pps", k, "all", lambda w: sum(w) / k) == pytest.approx(world.p, rel=1e-12)


@pytest.mark.parametrize("budget", [2, 4])
def test_5_lazy_attempts_overestimate_p(world, budget):
    """The trap: averaging over as many attempts as it took to be accepted."""
    lazy = world.expectation("pps", budget, "first", lambda w: sum(w) / len(w))
    factor = sum((1 - world.a) ** (t - 1) / t for t in range(1, budget + 1))
    assert factor > 1.05
    assert lazy == pytest.approx(world.p * factor, rel=1e-12)
    # With no limit on the attempts the factor is -ln a / (1 - a); a thousand terms are beyond rounding here.
    without_limit = sum((1 - world.a) ** (t - 1) / t for t in range(1, 1001))
    assert without_limit == pytest.approx(-math.log(world.a) / (1 - world.a), rel=1e-6)


def test_5_if_q_misses_part_of_the_posterior_the_estimate_falls_short(world):
    missed = max((o for o in OUTCOMES if accepted(o)), key=world.plain.__getitem__)
    rest = 1 - world.hinted[missed]
    world.hinted = {o: 0.0 if o == missed else chance / rest for o, chance in world.hinted.items()}
    estimate = world.expectation("pps", 2, "all", lambda w: sum(w) / 2)
    assert estimate == pytest.approx(world.p - world.plain[missed], rel=1e-12)


def test_5_log_mean_weight_is_a_bound_that_grows_if_q_always_accepts(world):
    world.hinted = {o: chance / world.a if accepted(o) else 0.0 for o, chance in world.hinted.items()}
    bounds = [world.expectation("pps", k, "all", lambda w: math.log(sum(w) / len(w))) for k in (1, 2, 3, 4)]
    assert all(lower < higher for lower, higher in pairwise(bounds))
    assert bounds[-1] < math.log(world.p)
