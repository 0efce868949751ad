"""The M-step against transformers and torch's AdamW, and against itself cut up in other ways."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers

from minem.config import MStepSection
from minem.em.masters import Masters
from minem.em.mstep import MStep, Totals, learning_rate, loss_divisor
from minem.em.packing import Example, Step, pack, plan
from minem.em.scoring import score
from minem.errors import GuardError, UserError
from minem.kernels import linear_cross_entropy
from minem.model.decoder import Model
from minem.model.sizes import SAFE_SHARE
from minem.model.weights import checkpoint_views, load_model
from minem.parallel.ranks import Ranks

EOS = 0
SHAPE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small random checkpoint of each architecture, biases and norms included."""
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


@pytest.fixture
def model(folders):
    return load_model(folders["llama"])


def referee(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make_examples(n: int, seed: int = 0) -> list[Example]:
    """Uneven lengths, uneven weights, each ending in EOS."""
    noise = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (1,), generator=noise))
        return torch.randint(1, SHAPE["vocab_size"], (size,), generator=noise).tolist()

    return [Example(f"q{i}", ids(1, 12), [*ids(0, 20), EOS], weight=(1.0, 0.5, 2.0)[i % 3]) for i in range(n)]


def reference_sums(model, examples) -> tuple[torch.Tensor, torch.Tensor]:
    """-sum(weight * log p) of the sampled tokens (EOS too, the prompt not), and their entropies; one by one."""
    loss, entropy = torch.zeros(()), torch.zeros(())
    for example in examples:
        sequence = torch.tensor([example.prompt_ids + example.token_ids])
        logprobs = model(sequence).logits[0, len(example.prompt_ids) - 1 : -1].log_softmax(-1)
        loss = loss - example.weight * logprobs.gather(1, torch.tensor(example.token_ids)[:, None]).sum()
        entropy = entropy - (logprobs.exp() * logprobs).sum()
    return loss, entropy


def in_their_names(model, tensors) -> dict[str, torch.Tensor]:
    """Tensors shaped like minem's parameters (its gradients, say), cut into Hugging Face's."""
    holder = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, tensor in zip(holder.parameters(), tensors, strict=True):
            parameter.copy_(tensor)
    return {name: view.detach() for name, view in checkpoint_views(holder).items()}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, relative: float = 1e-5) -> None:
    """Within `relative` of the tensor's size, in norm and at the worst element."""
    assert (ours - theirs).norm() <= relative * theirs.norm()
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_untouched(model, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


# ------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("architecture", CONFIGS)
def test_loss_and_every_gradient_equal_transformers(folders, architecture):
    ours, theirs = load_model(folders[architecture]), referee(folders[architecture])
    examples = make_examples(9)
    (step,) = plan([len(e) for e in examples], batch_size=9, pack_tokens=60, epochs=1, seed=0, iteration=1)
    assert 1 < len(step.micro_batches) < 9  # several micro-batches, and sequences that share one
    totals = MStep(ours, MStepSection()).accumulate(examples, step, divisor=7.0)

    loss, entropy = reference_sums(theirs, examples)
    (loss / 7.0).backward()
    assert totals.loss == pytest.approx(loss.item(), rel=1e-5)
    assert totals.entropy == pytest.approx(entropy.item(), rel=1e-5)
    assert totals.supervised == sum(len(e.token_ids) for e in examples)
    gradients = in_their_names(ours, [p.grad for p in ours.parameters()])
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name])


def test_packed_sequences_have_the_gradients_of_one_by_one(folders):
    examples = make_examples(8)
    gradients = []
    for micro_batches in [tuple(range(8))], [(i,) for i in range(8)]:
        one = load_model(folders["qwen3"])
        MStep(one, MStepSection()).accumulate(examples, Step(0, tuple(micro_batches)), divisor=1.0)
        gradients.append([p.grad for p in one.parameters()])
    for packed, alone in zip(*gradients, strict=True):
        assert_close(packed, alone)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_what_all_prompts_begin_with_is_computed_once_with_the_same_loss_and_gradients(folders, architecture):
    same = [2 + i % 40 for i in range(70)]
    examples = [replace(e, prompt_ids=[*same, *e.prompt_ids], weight=0.5 + i) for i, e in enumerate(make_examples(6))]
    examples[3] = replace(examples[2], token_ids=examples[2].token_ids[:-1])  # two draws of one prompt
    packed = pack(examples)
    assert packed.lengths == [64, *(len(example) - 64 for example in examples)]
    assert len(packed.input_ids) == sum(map(len, examples)) - 5 * 64
    found = []
    for micro_batches in [tuple(range(6))], [(i,) for i in range(6)]:
        one = load_model(folders[architecture])
        totals = MStep(one, MStepSection()).accumulate(examples, Step(0, tuple(micro_batches)), divisor=1.0)
        found.append((totals.loss, totals.entropy, [p.grad for p in one.parameters()]))
    (loss, entropy, together), (loss_alone, entropy_alone, alone) = found
    assert (loss, entropy) == pytest.approx((loss_alone, entropy_alone), rel=1e-5)
    for shared, own in zip(together, alone, strict=True):
        assert_close(shared, own)
    scored = score(one, examples, 10_000), score(one, examples, 1)
    for (logprobs, spread), (expected, expected_spread) in zip(*scored, strict=True):
        assert logprobs == pytest.approx(expected, abs=1e-4)
        assert spread == pytest.approx(expected_spread, abs=1e-4)


class Second(Ranks):
    """The second of two ranks, whose collectives see its own values only."""

    def __init__(self) -> None:
        super().__init__(1, 2)

    def total(self, values):
        return list(values)


def test_an_idle_rank_joins_the_collectives_with_gradients_of_zero(folders, monkeypatch):
    monkeypatch.setattr("minem.em.masters.sharded_copy", lambda model, ranks, replicate: copy.deepcopy(model))
    mstep = MStep(load_model(folders["llama"]), MStepSection(parallel="ddp"), Second())
    totals = mstep.accumulate(make_examples(3), Step(0, ((0, 1, 2), ())), 1.0)
    assert totals == Totals()
    assert all(not master.grad.any() for master in mstep.masters.values())


# ----------------------------------------------------------------------------- the whole trajectory


def trajectory(folder, capacity: int, chunk: int | None, epochs: int, monkeypatch) -> torch.Tensor:
    """The loss of each step, with micro-batches of `capacity` tokens and logits of `chunk` rows at a time."""
    monkeypatch.setattr("minem.model.decoder.linear_cross_entropy", partial(linear_cross_entropy, chunk_rows=chunk))
    rows: list[dict] = []
    config = MStepSection(lr=1e-3, batch_size=8, epochs=epochs, pack_tokens=capacity)
    MStep(load_model(folder), config).run(make_examples(40), seed=3, iteration=1, on_step=rows.append)
    return torch.tensor([row["loss"] for row in rows], dtype=torch.float64)


def test_micro_batches_and_chunks_of_the_loss_do_not_change_the_trajectory(folders, monkeypatch):
    """All in one micro-batch and one chunk of logits, against smaller ones of either."""
    whole = trajectory(folders["llama"], 10_000, 10_000, 2, monkeypatch)
    cut = trajectory(folders["llama"], 48, 5, 2, monkeypatch)
    assert len(whole) == 10
    assert (whole - cut).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("pack_tokens", "chunk_rows"), [(1, None), (48, None), (10_000, 1), (10_000, 7), (48, 5)])
def test_a_long_trajectory_does_not_depend_on_how_it_is_cut(folders, pack_tokens, chunk_rows, monkeypatch):
    """Over 30 steps, in which the loss falls: rounding does not add up, as it could after the quick test's ten."""
    whole = trajectory(folders["llama"], 10_000, 10_000, 6, monkeypatch)
    cut = trajectory(folders["llama"], pack_tokens, chunk_rows, 6, monkeypatch)
    assert len(whole) == 30
    assert whole[25:].mean() < whole[:5].mean() - 0.2  # the last epoch against the first
    assert (whole - cut).abs().max() < 1e-5
    assert (whole - cut).abs().mean() < 1e-6


def test_a_run_equals_plain_torch_on_transformers(folders):
    """The same updates written out with nothing of minem's but the plan: AdamW, clipping, warm-up, one divisor."""
    examples = make_examples(12)
    config = MStepSection(lr=1e-3, batch_size=4, epochs=2, warmup=0.4, schedule="linear", weight_decay=0.1, clip=0.7)
    ours, theirs = load_model(folders["qwen2"]), referee(folders["qwen2"])
    rows: list[dict] = []
    MStep(ours, config).run(examples, seed=5, iteration=2, on_step=rows.append)

    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    supervised_per_step = sum(len(e.token_ids) for e in examples) * 2 / 6
    rates = [1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3]  # 3 steps up, then down towards 0
    steps = plan([len(e) for e in examples], batch_size=4, pack_tokens=10, epochs=2, seed=5, iteration=2)
    for step, rate, row in zip(steps, rates, rows, strict=True):
        optimizer.zero_grad()
        loss, _ = reference_sums(theirs, [examples[i] for i in step.examples])
        (loss / supervised_per_step).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.7)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert row["lr"] == pytest.approx(rate)
    assert max(row["grad_norm"] for row in rows) > 0.7  # clipping had something to do
    trained = in_their_names(ours, list(ours.parameters()))
    for name, parameter in theirs.named_parameters():
        assert_close(trained[name], parameter.detach(), 2e-5)


def test_the_same_start_gives_the_same_weights(folders):
    trained = []
    for seed in (0, 0, 1):
        one = load_model(folders["llama"])
        MStep(one, MStepSection(lr=1e-3, batch_size=4)).run(make_examples(10), seed=seed, iteration=1)
        trained.append(weights_of(one))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert not all(torch.equal(trained[0][name], trained[2][name]) for name in trained[0])


def test_the_summary_counts_what_was_trained(model):
    examples = make_examples(10)
    rows: list[dict] = []
    mstep = MStep(model, MStepSection(lr=1e-3, batch_size=4, epochs=2))
    summary = mstep.run(examples, 0, 1, rows.append)
    supervised = sum(len(e.token_ids) for e in examples)
    assert (summary["examples"], summary["steps"], len(rows)) == (10, 6, 6)
    assert summary["supervised_tokens"] == 2 * supervised == sum(row["supervised_tokens"] for row in rows)
    assert summary["tokens"] == 2 * sum(len(e) for e in examples)
    assert summary["grad_norm"] == pytest.approx(sum(row["grad_norm"] for row in rows) / 6)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert mstep.losses == [row["loss"] for row in rows]
    assert mstep.losses == [row["loss"] for row in rows]
    assert sum(row["loss"] for row in rows[3:]) < sum(row["loss"] for row in rows[:3])
    for key in ("loss", "entropy"):
        assert min(row[key] for row in rows) < summary[key] < max(row[key] for row in rows)
    assert 0 < summary["entropy"] < math.log(SHAPE["vocab_size"])


# ------------------------------------------------------------------------------------- the divisor


@pytest.fixture
def recorded(monkeypatch) -> list[torch.Tensor]:
    """The gradient of each optimizer step as it reaches the update."""
    seen, step = [], Masters.step

    def recording(masters, norm, rate):
        seen.append(torch.cat([master.grad.flatten() for master in masters.values()]))
        step(masters, norm, rate)

    monkeypatch.setattr(Masters, "step", recording)
    return seen


def test_long_rationales_are_not_weighed_down(folders, recorded):
    """At a standing model the steps' gradients, times the one divisor, add up to the gradient of the summed log p."""
    noise = make_examples(30, seed=2)
    short = [Example("short", e.prompt_ids, e.token_ids[-2:]) for e in noise[:4]]
    long = [Example("long", e.prompt_ids, (e.token_ids * 20)[-20:]) for e in noise[4:8]]
    examples = short + long
    ours, theirs = load_model(folders["llama"]), referee(folders["llama"])
    MStep(ours, MStepSection(lr=0.0, batch_size=1)).run(examples, seed=0, iteration=1)

    def gradient(of: list[Example]) -> dict[str, torch.Tensor]:
        theirs.zero_grad()
        reference_sums(theirs, of)[0].backward()
        return {name: p.grad.clone() for name, p in theirs.named_parameters()}

    divisor = sum(len(e.token_ids) for e in examples) / 8
    assert loss_divisor(examples, 8) == divisor
    names = list(in_their_names(ours, list(ours.parameters())))
    sizes = [p.numel() for p in ours.parameters()]
    shaped = [s.view_as(p) for s, p in zip(sum(recorded).split(sizes), ours.parameters(), strict=True)]
    total = in_their_names(ours, shaped)
    expected = gradient(examples)
    for name in names:
        assert_close(total[name] * divisor, expected[name])
    # The mean over each step's own tokens points elsewhere: a long one gets a tenth of the weight of a short one.
    token_mean = [gradient([e]) for e in examples]
    for name in names:
        wrong = sum(g[name] / len(e.token_ids) for g, e in zip(token_mean, examples, strict=True))
        assert torch.cosine_similarity(wrong.flatten(), expected[name].flatten(), dim=0) < 0.95


# ------------------------------------------------------------------------------------------- memory


def test_out_of_memory_leaves_the_weights_alone(folders, monkeypatch):
    forward = Model.forward

    def limited(self, **batch):
        loss, logprobs, entropy = forward(self, **batch)
        if len(batch["input_ids"]) > 60:
            loss.register_hook(lambda gradient: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
        return loss, logprobs, entropy

    monkeypatch.setattr(Model, "forward", limited)
    monkeypatch.setattr("minem.em.masters.sharded_copy", lambda model, ranks, replicate: copy.deepcopy(model))
    for ranks in (Ranks(), Second()):
        model = load_model(folders["llama"])
        start, mstep = weights_of(model), MStep(model, MStepSection(batch_size=16, pack_tokens=500), ranks)
        with pytest.raises(torch.OutOfMemoryError):
            mstep.run(make_examples(32), seed=0, iteration=1)
        assert_untouched(model, start)


def test_another_runtime_error_is_a_bug_and_keeps_its_traceback(model, monkeypatch):
    monkeypatch.setattr(Masters, "step", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        MStep(model, MStepSection()).run(make_examples(4), seed=0, iteration=1)


def test_as_few_blocks_as_fit_recompute_their_activations(model, monkeypatch):
    mstep = MStep(model, MStepSection())
    monkeypatch.setattr(MStep, "memory_needed", lambda self, blocks: 100 - 10 * blocks)
    for room, blocks in ((100, 0), (99, 1), (90, 1), (89, 2), (0, 2)):
        monkeypatch.setattr(MStep, "room", lambda self, room=room: room)
        assert mstep.run(make_examples(2), seed=0, iteration=1)["checkpointed"] == blocks
    for setting, blocks in (("off", 0), ("full", 2)):
        mstep = MStep(model, MStepSection(checkpointing=setting))
        assert mstep.run(make_examples(2), seed=0, iteration=1)["checkpointed"] == blocks


@pytest.mark.parametrize("rank", [0, 4])
def test_masters_are_sharded_if_a_replica_of_them_does_not_fit(folders, monkeypatch, rank):
    """Several ranks train a second model beside the generator's; only its float32 masters make the difference."""

    class Two(Ranks):
        def any(self, flag: bool) -> bool:
            return flag

    config = MStepSection(lora_rank=rank)
    model = load_model(folders["llama"], dtype=torch.bfloat16)
    alone = MStep(model, config, base=folders["llama"])
    beside = alone.memory_needed(model.config.num_hidden_layers)
    weights = sum(p.numel() for p in model.parameters())
    copied = 4 * weights if not rank else 2 * weights + alone.master_bytes
    monkeypatch.setattr("minem.em.masters.sharded_copy", lambda model, ranks, replicate: copy.deepcopy(model))
    for needed, strategy in ((beside + 0.9 * copied, "fsdp"), (beside + 1.1 * copied, "ddp")):
        free = needed / SAFE_SHARE * 2  # two ranks on a CPU share it
        monkeypatch.setattr("minem.em.mstep.free_memory", lambda device, free=free: free)
        model = load_model(folders["llama"], dtype=torch.bfloat16)
        assert MStep(model, config, Two(0, 2), base=folders["llama"]).strategy == strategy


# ---------------------------------------------------------------------------------------- precision


def test_a_base_in_bfloat16_is_trained_in_float32_and_exported_as_it_was_stored(folders, tmp_path):
    """The generator's weights are those of the exported file, and updates too small for them add up in the masters."""
    transformers.AutoModelForCausalLM.from_pretrained(folders["llama"]).bfloat16().save_pretrained(tmp_path)
    examples, config = make_examples(16), MStepSection(lr=1e-6, batch_size=4, warmup=0.0, schedule="constant")
    model = load_model(tmp_path)
    assert (model.dtype, model.stored_dtype) == (torch.float32, torch.bfloat16)
    exact = load_model(folders["llama"])  # the same weights, its own masters
    exact.load_state_dict(model.state_dict())
    mstep, other = MStep(model, config), MStep(exact, config)
    assert mstep.state_bytes > 0 == other.state_bytes
    for iteration in (1, 2, 3):
        mstep.run(examples, seed=0, iteration=iteration)
        other.run(examples, seed=0, iteration=iteration)
        for name, p in model.named_parameters():
            assert torch.equal(p, p.bfloat16().float()), name
            assert torch.equal(p, mstep.masters[name].bfloat16().float()), name
    start = load_model(tmp_path).state_dict()
    ours, theirs = (
        torch.cat([(master.detach() - start[name]).flatten() for name, master in step.masters.items()])
        for step in (mstep, other)
    )
    assert ours.norm() == pytest.approx(float(theirs.norm()), rel=0.05)
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9
    mstep.save(tmp_path / "state")
    again = MStep(load_model(tmp_path), config)
    again.load(tmp_path / "state")
    for name, p in again.model.named_parameters():
        assert torch.equal(p, dict(model.named_parameters())[name]), name
        assert torch.equal(again.masters[name], mstep.masters[name]), name


def test_tiny_updates_are_not_lost_in_bfloat16(folders):
    examples = make_examples(16)
    config = MStepSection(lr=1e-6, batch_size=4, epochs=3, warmup=0.0, schedule="constant")
    start = weights_of(load_model(folders["llama"], dtype=torch.bfloat16))
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        one = load_model(folders["llama"], dtype=torch.bfloat16).to(dtype)
        mstep = MStep(one, config)
        mstep.run(examples, seed=0, iteration=1)
        moved[dtype] = torch.cat([(m.detach() - start[name].float()).flatten() for name, m in mstep.masters.items()])
        assert (mstep.state_bytes > 0) == (dtype == torch.bfloat16)
    full, half = moved[torch.float32], moved[torch.bfloat16]
    assert half.norm() == pytest.approx(float(full.norm()), rel=0.02)
    assert torch.cosine_similarity(full, half, dim=0) > 0.98

    # What happens without masters: AdamW on the bfloat16 weights themselves loses nearly all of it.
    naive = load_model(folders["llama"], dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(naive.parameters(), lr=1e-6, weight_decay=0.0)
    for step in plan([len(e) for e in examples], batch_size=4, pack_tokens=999, epochs=3, seed=0, iteration=1):
        optimizer.zero_grad()
        MStep(naive, config).accumulate(examples, step, loss_divisor(examples, 4))
        optimizer.step()
    kept = torch.cat([(p.detach().float() - start[name].float()).flatten() for name, p in naive.named_parameters()])
    assert (kept != 0).float().mean() < 0.05
    assert (half != 0).float().mean() > 0.9


def test_bfloat16_micro_batches_are_summed_in_float32(folders, recorded):
    examples = make_examples(12)
    model = load_model(folders["llama"], dtype=torch.bfloat16)
    MStep(model, MStepSection(lr=0.0, batch_size=12, pack_tokens=1)).run(examples, seed=0, iteration=1)
    divisor = loss_divisor(examples, 1)
    expected = torch.zeros_like(recorded[0])
    for i in range(12):
        MStep(model, MStepSection()).accumulate(examples, Step(0, ((i,),)), divisor)
        expected += torch.cat([p.grad.float().flatten() for p in model.parameters()])
        model.zero_grad()
    assert_close(recorded[0], expected, 1e-6)


@pytest.mark.parametrize("optimizer_state", ["reset", "keep"])
def test_a_resumed_process_has_the_same_masters(folders, tmp_path, monkeypatch, optimizer_state):
    """Iteration 2 after a restart, from several small files, is bit for bit that of a process that never stopped."""
    monkeypatch.setattr("minem.em.masters.FILE_BYTES", 20_000)
    examples = make_examples(8)
    config = MStepSection(lr=1e-6, batch_size=4, optimizer_state=optimizer_state)
    staying = MStep(load_model(folders["qwen3"], dtype=torch.bfloat16), config)
    staying.run(examples, seed=0, iteration=1)
    staying.save(tmp_path / "state")
    files = list((tmp_path / "state").glob("*.safetensors"))
    assert len(files) > 2
    assert sum(f.stat().st_size for f in files) == pytest.approx(staying.state_bytes, rel=0.1)
    resumed = MStep(load_model(folders["qwen3"], dtype=torch.bfloat16), config)
    resumed.load(tmp_path / "state")
    for mstep in (staying, resumed):
        mstep.run(examples, seed=0, iteration=2)
    for (name, master), working in zip(staying.masters.items(), staying.model.parameters(), strict=True):
        assert torch.equal(master, resumed.masters[name])
        assert torch.equal(working, dict(resumed.model.named_parameters())[name])
        assert torch.equal(working, master.bfloat16())


def test_an_m_step_is_resumed_in_its_middle(folders, tmp_path):
    """A checkpoint holds AdamW's moments and the metrics so far, even if the next iteration resets them."""
    examples, config = make_examples(12), MStepSection(lr=1e-3, batch_size=3)
    staying, resumed = (MStep(load_model(folders["llama"]), config) for _ in range(2))

    def checkpoint(row):
        if row["step"] == 2:
            staying.save(tmp_path)

    whole = staying.run(examples, seed=0, iteration=1, on_step=checkpoint)
    resumed.load(tmp_path)
    rest: list[dict] = []
    summary = resumed.run(examples, seed=0, iteration=1, on_step=rest.append)
    assert [row["step"] for row in rest] == [3, 4]
    for key in ("loss", "entropy", "grad_norm", "tokens", "supervised_tokens", "steps"):
        assert summary[key] == whole[key]
    assert_untouched(resumed.model, weights_of(staying.model))


def test_masters_of_another_model_are_refused(folders, tmp_path):
    MStep(load_model(folders["qwen3"]), MStepSection()).save(tmp_path / "state")
    with pytest.raises(UserError, match=r"master weights of another model.*layers\.0\.attention"):
        MStep(load_model(folders["llama"]), MStepSection()).load(tmp_path / "state")


def test_reset_follows_weights_written_from_outside(folders):
    """Restarting from the base model: the masters must not bring the trained weights back."""
    base = load_model(folders["llama"], dtype=torch.bfloat16)
    start = weights_of(base)
    mstep = MStep(base, MStepSection(lr=1e-2, batch_size=4))
    mstep.run(make_examples(8), seed=0, iteration=1)
    assert not torch.equal(base.embed.weight, start["embed.weight"])
    base.load_state_dict(start, strict=False)
    mstep.reset()
    assert all(torch.equal(master, start[name].float()) for name, master in mstep.masters.items())


# ------------------------------------------------------------------------------------------- guards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_non_finite_loss_names_its_example_and_touches_nothing(folders, dtype):
    model = load_model(folders["llama"], dtype=dtype)
    examples = make_examples(6)
    examples[4] = Example("broken", [1, 47], [3, EOS])
    others = [e for i, e in enumerate(examples) if i != 4]
    clean = [Example(e.id, [min(t, 46) for t in e.prompt_ids], [min(t, 46) for t in e.token_ids]) for e in others]
    with torch.no_grad():
        model.embed.weight[47] = 3e38  # finite itself; its square in the norm is not, nor is its logit
    model.head.weight = torch.nn.Parameter(model.embed.weight.detach().clone().clamp(-9, 9))  # untied: only an input
    before = weights_of(model)
    mstep = MStep(model, MStepSection(lr=1e-2, batch_size=6))
    with pytest.raises(GuardError, match=r"not updated; examples at fault: broken$"):
        mstep.run([*clean[:4], examples[4], *clean[4:]], seed=0, iteration=1)
    assert_untouched(model, before)
    assert all(p.grad is None for p in model.parameters())
    # The same object trains on once the cause is gone.
    assert mstep.run(clean, seed=0, iteration=1)["steps"] == 1


def test_a_non_finite_gradient_under_a_finite_loss_is_caught(model):
    before = weights_of(model)
    model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(GuardError, match="q0, q1, q2, q3, q4 and 3 more"):
        MStep(model, MStepSection(lr=1e-2, batch_size=8)).run(make_examples(8), seed=0, iteration=1)
    assert_untouched(model, before)


def test_weights_that_the_last_update_ruined_are_noticed(model, monkeypatch):
    step = Masters.step

    def ruin(masters, norm, rate):
        step(masters, norm, rate)
        with torch.no_grad():
            masters["norm.weight"][0] = math.inf

    monkeypatch.setattr(Masters, "step", ruin)
    with pytest.raises(GuardError, match=r"not finite after the last update \(norm.weight\); lower mstep.lr"):
        MStep(model, MStepSection()).run(make_examples(4), seed=0, iteration=1)


# ---------------------------------------------------------------------------------------- schedule


def test_schedules_by_hand():
    def rates(schedule: str, warmup: float = 0.5) -> list[float]:
        config = MStepSection(lr=1.0, warmup=warmup, schedule=schedule)
        return [learning_rate(config, step, 8) for step in range(8)]

    assert rates("linear") == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert rates("cosine")[4:] == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])
    assert rates("constant", warmup=0.0) == [1.0] * 8
    assert rates("cosine", warmup=1.0)[-1] == 1.0
    assert learning_rate(MStepSection(lr=1.0), 0, 1) == 1.0  # a single step is not spent on warming up


def test_metrics_are_those_of_a_token(model):
    totals = Totals(loss=3.0, entropy=math.nan, tokens=1000, supervised=100, weight=2.0, seconds=2.0)
    found = MStep(model, MStepSection())._metrics(totals)
    assert found["entropy"] is None  # what is not finite would not be JSON
    assert (found["loss"], found["tokens_per_second"]) == (1.5, 500)
