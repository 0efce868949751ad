"""The plan of an M-step: complete, within capacity, deterministic, and shuffled before it is packed."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minem.em.packing import Example, best_fit_decreasing, even_bins, pack, plan, shuffle

plans = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 50), min_size=1, max_size=60),
        "batch_size": st.integers(1, 70),
        "pack_tokens": st.integers(1, 100),
        "epochs": st.integers(1, 3),
        "seed": st.integers(0, 2**40),
        "iteration": st.integers(0, 5),
    }
)


@settings(max_examples=60, deadline=None)
@given(plans)
def test_every_example_once_per_epoch_in_even_steps_within_capacity(arguments):
    lengths = arguments["lengths"]
    steps = plan(**arguments)
    for epoch in range(arguments["epochs"]):
        sizes = [len(step.examples) for step in steps if step.epoch == epoch]
        assert len(sizes) == -(-len(lengths) // arguments["batch_size"])
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= arguments["batch_size"]
        assert sorted(i for step in steps if step.epoch == epoch for i in step.examples) == list(range(len(lengths)))
    for micro_batch in (m for step in steps for m in step.micro_batches):
        assert micro_batch
        assert len(micro_batch) == 1 or sum(lengths[i] for i in micro_batch) <= arguments["pack_tokens"]
    assert [step.epoch for step in steps] == sorted(step.epoch for step in steps)
    assert steps == plan(**arguments)


@settings(max_examples=50, deadline=None)
@given(plans, st.integers(1, 100), st.integers(1, 9))
def test_neither_capacity_nor_ranks_change_an_optimizer_step(arguments, pack_tokens, ranks):
    steps = plan(**arguments)
    others = plan(**{**arguments, "pack_tokens": pack_tokens}, ranks=ranks)
    assert [step.examples for step in steps] == [step.examples for step in others]


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(2, 9))
def test_ranks_share_a_step_in_equally_many_micro_batches_within_capacity(arguments, ranks):
    lengths, capacity = arguments["lengths"], arguments["pack_tokens"]
    steps = plan(**arguments, ranks=ranks)
    assert steps == plan(**arguments, ranks=ranks)
    for step, alone in zip(steps, plan(**arguments), strict=True):
        shares = [step.share(rank, ranks) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(i for share in shares for micro_batch in share for i in micro_batch) == alone.examples
        assert len(step.micro_batches) == -(-len(alone.micro_batches) // ranks) * ranks  # no more rounds than needed
        loads = [sum(lengths[i] for i in one) for one in step.micro_batches]
        for micro_batch, load in zip(step.micro_batches, loads, strict=True):
            assert len(micro_batch) <= 1 or load <= capacity
        if () in step.micro_batches:  # only if nothing is left to split
            assert all(len(one) <= 1 for one in step.micro_batches)
        rounds = [loads[i : i + ranks] for i in range(0, len(loads), ranks)]
        assert all(min(larger) >= max(smaller) for larger, smaller in pairwise(rounds))
    assert plan(**arguments, ranks=1) == plan(**arguments)


def test_the_ranks_work_is_even():
    """Lengths like those of rationales: in lockstep, two to eight ranks wait for little."""
    lengths = torch.empty(512).log_normal_(5.5, 0.6, generator=torch.Generator().manual_seed(0)).int().tolist()
    for ranks in (2, 3, 8):
        (step,) = plan(lengths, batch_size=512, pack_tokens=8192, epochs=1, seed=0, iteration=1, ranks=ranks)
        loads = torch.tensor([[sum(lengths[i] for i in one) for one in step.share(r, ranks)] for r in range(ranks)])
        assert loads.max(0).values.sum() * ranks <= 1.02 * loads.sum()


def test_even_bins_by_hand():
    # One bin would do. For two ranks bins of 5 are enough, for three bins of 3 (the 4 is longer and has its own).
    assert even_bins([4, 2, 2, 1], 10, 2) == [[0, 3], [1, 2]]
    assert even_bins([4, 2, 2, 1], 10, 3) == [[0], [1, 3], [2]]
    # Six 3s fill six bins of 3 or three of 6, never four: one of the three is split.
    assert even_bins([3] * 6, 7, 4) == [[2, 3], [4, 5], [0], [1]]
    assert even_bins([5, 3], 10, 4) == [[0], [1], [], []]
    # Three bins of 8 tokens for two ranks: four of 6 do as well, and the second round goes backwards.
    assert even_bins([4, 4, 4, 4, 2, 2, 2, 2], 8, 2) == [[0, 4], [1, 5], [3, 7], [2, 6]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=60))
def test_all_bins_except_one_are_half_full_or_more(lengths):
    bins = best_fit_decreasing(lengths, 100)
    loads = sorted(sum(lengths[i] for i in one) for one in bins)
    # No two bins would fit into one: otherwise best fit would not have opened the second.
    assert all(loads[i] + loads[j] > 100 for i in range(len(loads)) for j in range(i))


def test_best_fit_decreasing_by_hand():
    # 6 | 5 | 4 into 6 (fullest that fits) | 3 into 5 | 2 into 5+3 | 2 opens a third; 12 is longer than any bin.
    lengths = [2, 3, 6, 12, 4, 5, 2]
    assert best_fit_decreasing(lengths, 10) == [[3], [2, 4], [5, 1, 0], [6]]


def test_shuffles_depend_on_seed_iteration_and_epoch_and_are_unbiased():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)]
    orders = {tuple(shuffle(20, *key)) for key in keys}
    assert len(orders) == len(keys)
    counts = torch.zeros(4, 4)
    for seed in range(1000):
        for position, item in enumerate(shuffle(4, seed, 1, 0)):
            counts[position, item] += 1
    chi_square = ((counts - 250) ** 2 / 250).sum()
    assert chi_square < 27.9  # 0.1 % point of chi-square with (4 - 1) * (4 - 1) = 9 degrees of freedom


def test_the_shuffle_is_the_same_on_every_machine():
    # Written down once: a run that is continued after an update of a library must not change its order.
    assert shuffle(8, 0, 1, 0) == [0, 2, 6, 4, 3, 7, 5, 1]


def test_pack_supervises_the_sampled_tokens_only():
    first = Example("a", [1, 2, 3], [7, 8, 9], weight=0.5)
    second = Example("b", [4], [5])
    packed = pack([first, second])
    assert packed.input_ids.tolist() == [1, 2, 3, 7, 8, 4]  # the last sampled token (EOS) is a target, never an input
    assert packed.lengths == [5, 1] == [len(first), len(second)]
    assert packed.rows.tolist() == [2, 3, 4, 5]
    assert packed.targets.tolist() == [7, 8, 9, 5]
    assert packed.token_weights.tolist() == [0.5, 0.5, 0.5, 1.0]
