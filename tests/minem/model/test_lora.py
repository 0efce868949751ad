"""LoRA against peft, against the frozen model, and against itself after a restart."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp import fully_shard

import minem
from minem.cli import main
from minem.config import MStepSection, load_config
from minem.em.mstep import MStep
from minem.em.packing import Step, plan
from minem.errors import UserError
from minem.model.lora import ADAPTER_WEIGHTS, TARGETS
from minem.model.weights import checkpoint_views, load_model
from minem.runs.directory import read_journal
from tests.minem.em.test_mstep import assert_close, make_examples, reference_sums, weights_of
from tests.minem.folders import VOCABULARY, make_folder
from tests.minem.tiny_runs import flags

KINDS = ("llama-tied", "qwen2", "qwen3")
SUBSET = "q_proj,v_proj,up_proj,down_proj"
CASES = [("llama-tied", "all"), ("qwen2", SUBSET), ("qwen3", "all")]  # (model, targets)
SMALL = {"lr": 1e-2, "batch_size": 4, "epochs": 2, "lora_rank": 4, "lora_alpha": 12.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        make_folder(folder, kind)
    return made


def make_mstep(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> MStep:
    return MStep(load_model(folder, dtype=dtype), MStepSection(**{**SMALL, **config}), seed=seed, base=folder)


def losses_of(mstep: MStep, examples, **run: int) -> torch.Tensor:
    rows: list[dict] = []
    mstep.run(examples, **{"seed": 0, "iteration": 1, **run}, on_step=rows.append)
    return torch.tensor([row["loss"] for row in rows], dtype=torch.float64)


def referee(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def peft_model(folder: Path, targets: str, adapter: dict[str, torch.Tensor]):
    """peft's own LoRA on transformers' model, with the numbers of `adapter`; its names and shapes must be peft's."""
    names = list(TARGETS) if targets == "all" else targets.split(",")
    config = peft.LoraConfig(r=4, lora_alpha=12.0, target_modules=names, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = peft.get_peft_model(referee(folder), config)
    fresh = peft.get_peft_model_state_dict(model)
    assert {name: t.shape for name, t in fresh.items()} == {name: t.shape for name, t in adapter.items()}
    peft.set_peft_model_state_dict(model, adapter)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------ beside the frozen model


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama-tied", torch.bfloat16), ("qwen2", torch.float32), ("qwen3", torch.float32)]
)
def test_new_adapters_change_nothing_and_only_they_are_trained(folders, kind, dtype):
    frozen, mstep = load_model(folders[kind], dtype=dtype), make_mstep(folders[kind], dtype)
    before, names = weights_of(mstep.model), list(dict(mstep.model.named_parameters()))
    examples, lora = make_examples(6), mstep.lora
    assert lora is not None
    with lora.attached():
        assert torch.equal(mstep.model(tokens()), frozen(tokens()))
        totals = mstep.accumulate(examples, Step(0, (tuple(range(6)),)), 1.0)
        for name, parameter in mstep.model.named_parameters():
            assert (parameter.grad is not None) == (".lora." in name), name
    assert totals.loss == MStep(frozen, MStepSection()).accumulate(examples, Step(0, (tuple(range(6)),)), 1.0).loss
    assert list(dict(mstep.model.named_parameters())) == names
    mstep.run(examples, seed=0, iteration=1)
    lora._unmerge()
    assert all(torch.equal(before[name], p) for name, p in mstep.model.named_parameters())
    assert all(master.abs().max() > 0 for master in mstep.masters.values())


def test_30_steps_at_rate_0_have_the_losses_of_the_frozen_model(folders):
    examples, same = make_examples(20), {"lr": 0.0, "batch_size": 4, "epochs": 6, "pack_tokens": 48}
    ours = losses_of(make_mstep(folders["qwen3"], **same), examples)
    frozen = losses_of(MStep(load_model(folders["qwen3"]), MStepSection(**same)), examples)
    assert len(ours) == 30
    assert (ours - frozen).abs().max() < 1e-5
    assert (ours - frozen).abs().mean() < 1e-6


# ---------------------------------------------------------------------------------------------- beside peft


@pytest.mark.parametrize(("kind", "targets"), CASES)
def test_peft_loads_the_adapter_and_transformers_the_merged_model(folders, kind, targets, tmp_path):
    mstep = make_mstep(folders[kind], lora_targets=targets)
    mstep.run(make_examples(12), seed=0, iteration=1)
    assert mstep.lora is not None
    mstep.lora.save(tmp_path / "adapter", mstep.masters, "some/model")
    minem.save(mstep.model, minem.load(folders[kind])[1], tmp_path / "model")

    loaded = peft.PeftModel.from_pretrained(referee(folders[kind]), tmp_path / "adapter")
    config = loaded.peft_config["default"]
    assert (config.base_model_name_or_path, config.r, config.lora_alpha) == ("some/model", 4, 12.0)
    assert set(config.target_modules) == set(TARGETS if targets == "all" else targets.split(","))
    with torch.no_grad():
        base, theirs = referee(folders[kind])(tokens()).logits, loaded(tokens()).logits
        merged, ours = referee(tmp_path / "model")(tokens()).logits, mstep.model(tokens())
        with mstep.lora.attached():
            beside = mstep.model(tokens())
    assert (theirs - base).abs().max() > 0.1 * base.abs().max()  # it learned something to compare
    assert_close(merged, theirs)
    assert_close(ours, theirs)
    assert_close(beside, theirs)


@pytest.mark.parametrize(("kind", "targets"), CASES)
def test_loss_and_every_gradient_equal_those_of_peft(folders, kind, targets):
    """Where B is not 0, so that A has a gradient, too."""
    examples, mstep = make_examples(9), make_mstep(folders[kind], lora_targets=targets)
    lora, noise = mstep.lora, torch.Generator().manual_seed(0)
    assert lora is not None
    start = {n: p.detach() + 0.05 * torch.randn(p.shape, generator=noise) for n, p in lora.named_parameters().items()}
    theirs = peft_model(folders[kind], targets, start)
    loss, _ = reference_sums(theirs, examples)
    (loss / 7.0).backward()
    expected = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}

    with torch.no_grad():
        for name, parameter in lora.named_parameters().items():
            parameter.copy_(start[name])
    with lora.attached():
        totals = mstep.accumulate(examples, Step(0, ((0, 1, 2, 3), (4, 5, 6, 7, 8))), divisor=7.0)
    assert totals.loss == pytest.approx(loss.item(), rel=1e-5)
    assert lora.named_parameters().keys() == expected.keys()
    for name, parameter in lora.named_parameters().items():
        assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize(("kind", "targets"), CASES[1:])
def test_training_equals_peft_with_torch(folders, kind, targets):
    examples = make_examples(12)
    mstep = make_mstep(folders[kind], lora_targets=targets, lr=1e-3, warmup=0.0, schedule="constant", clip=0.0)
    start = {name: master.detach().clone() for name, master in mstep.masters.items()}
    assert mstep.lora is not None
    losses = losses_of(mstep, examples, seed=5)

    theirs = peft_model(folders[kind], targets, start)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    divisor = sum(len(e.token_ids) for e in examples) / 3
    steps = plan([len(e) for e in examples], batch_size=4, pack_tokens=99, epochs=2, seed=5, iteration=1)
    for step, ours in zip(steps, losses, strict=True):
        optimizer.zero_grad()
        members = [examples[i] for i in step.examples]
        loss, _ = reference_sums(theirs, members)
        assert loss.item() / sum(e.weight * len(e.token_ids) for e in members) == pytest.approx(float(ours), abs=1e-5)
        (loss / divisor).backward()
        optimizer.step()
    expected = peft.get_peft_model_state_dict(theirs)
    for letter in "AB":
        names = [name for name in expected if f".lora_{letter}." in name]
        both = [torch.cat([one[name].detach().flatten() for name in names]) for one in (mstep.masters, expected)]
        assert (both[0] - both[1]).norm() <= 1e-5 * both[1].norm()  # in norm: AdamW makes much of tiny gradients


# ------------------------------------------------------------------------------------- merging and precision


@pytest.mark.parametrize("init", ["previous", "base"])
def test_merging_does_not_accumulate_rounding_over_iterations(folders, init, tmp_path):
    """After three iterations in bfloat16 each weight is base + scale * B A, in float64, rounded once."""
    mstep, alone = (make_mstep(folders["llama-tied"], torch.bfloat16, lr=1e-3) for _ in range(2))
    for iteration in (1, 2, 3):
        if init == "base":  # as the EM loop does: the base model's weights, then new adapters
            mstep.model.load_state_dict(load_model(folders["llama-tied"], dtype=torch.bfloat16).state_dict())
            mstep.reset()
        mstep.run(make_examples(8), seed=0, iteration=iteration)
    if init == "base":  # nothing is left of iterations 1 and 2
        alone.run(make_examples(8), seed=0, iteration=3)
        assert all(torch.equal(master, alone.masters[name]) for name, master in mstep.masters.items())
    assert mstep.lora is not None
    mstep.lora.save(tmp_path, mstep.masters, "base")
    adapter = load_file(tmp_path / ADAPTER_WEIGHTS)
    assert {t.dtype for t in adapter.values()} == {torch.float32}
    assert adapter.keys() == mstep.masters.keys()
    assert all(torch.equal(tensor, mstep.masters[name]) for name, tensor in adapter.items())  # saved bit for bit
    base = checkpoint_views(load_model(folders["llama-tied"], dtype=torch.bfloat16))
    moved = 0
    for name, weight in checkpoint_views(mstep.model).items():
        a, b = (adapter.get(f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight") for x in "AB")
        exact = base[name].double()
        if a is not None and b is not None:
            exact = exact + 12.0 / 4 * b.double() @ a.double()
            moved += 1
        assert ((weight.double() - exact).abs() <= (2**-8 + 1e-5) * exact.abs() + 1e-8).all(), name
    assert moved == 3 * len(TARGETS)


def test_a_resumed_process_continues_bit_for_bit(folders, tmp_path):
    examples, folder = make_examples(8), folders["qwen3"]
    staying = make_mstep(folder, torch.bfloat16)
    staying.run(examples, seed=0, iteration=1)
    staying.save(tmp_path)
    continued = make_mstep(folder, torch.bfloat16)
    continued.load(tmp_path)
    for _ in range(2):  # as it was restored, and after another iteration
        for name, parameter in staying.model.named_parameters():
            assert torch.equal(parameter, dict(continued.model.named_parameters())[name]), name
        for name, master in staying.masters.items():
            assert torch.equal(master, continued.masters[name]), name
        for mstep in (staying, continued):
            mstep.run(examples, seed=0, iteration=2)


def test_tiny_updates_are_not_lost_in_bfloat16(folders):
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        mstep = make_mstep(folders["llama-tied"], dtype, lr=1e-6, epochs=4, warmup=0.0, schedule="constant")
        start = {name: master.detach().clone() for name, master in mstep.masters.items()}
        mstep.run(make_examples(8), seed=0, iteration=1)
        moved[dtype] = torch.cat([(m.detach() - start[name]).flatten() for name, m in mstep.masters.items()])
    full, half = moved[torch.float32], moved[torch.bfloat16]
    assert half.norm() == pytest.approx(float(full.norm()), rel=0.02)
    assert torch.cosine_similarity(full, half, dim=0) > 0.98
    assert (half != 0).float().mean() > 0.9


def test_adapters_begin_as_those_of_peft_and_alike_with_the_same_seed(folders):
    first, again, other = (make_mstep(folders["qwen2"], seed=seed).masters for seed in (3, 3, 4))
    config = peft.LoraConfig(r=4, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(referee(folders["qwen2"]), config))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, other[name]) == (".lora_B." in name)
        for size in (torch.std, lambda t: t.abs().max()):
            assert float(size(tensor.detach())) == pytest.approx(float(size(theirs[name])), rel=0.25)


# ------------------------------------------------------------------------------------------------- sharding


def test_adapters_work_inside_sharded_blocks(folders):
    """FSDP2's `fully_shard` replaces parameters inside the blocks; the losses and gradients stay the same."""
    examples, step = make_examples(6), Step(0, ((0, 1, 2), (3, 4, 5)))
    plain, sharded = (make_mstep(folders["qwen3"]) for _ in range(2))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    attached = ExitStack()
    try:
        totals = []
        for mstep in (plain, sharded):
            lora = mstep.lora
            assert lora is not None
            with torch.no_grad():  # a B of 0 would hide A
                for parameter in lora.named_parameters().values():
                    parameter.add_(0.01)
            attached.enter_context(lora.attached())
            if mstep is sharded:
                mesh = distributed.init_device_mesh("cpu", (1,))
                for module in (*mstep.model.layers, mstep.model):
                    fully_shard(module, mesh=mesh).set_force_sum_reduction_for_comms(True)
            totals.append(mstep.accumulate(examples, step, 1.0))
        assert totals[0] == totals[1]
        assert sharded.lora is not None
        assert plain.lora is not None
        expected = plain.lora.named_parameters()
        for name, parameter in sharded.lora.named_parameters().items():
            assert_close(parameter.grad.full_tensor(), expected[name].grad)
        for name, parameter in sharded.model.named_parameters():
            assert (parameter.grad is not None) == (".lora." in name), name
    finally:
        attached.close()
        distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------ whole runs


def test_a_run_trains_adapters_and_gets_better(tmp_path):
    run = tmp_path / "run"
    settings = ["mstep.lora_rank=8", "mstep.lora_targets=q_proj,v_proj,up_proj", "mstep.lr=1e-2", "eval.samples=0"]
    sets = [part for setting in (*settings, "eval.diagnostics=0") for part in ("--set", setting)]
    arguments = ["--limit", "32", "--iterations", "2", *sets, "--out", str(run)]
    done = CliRunner().invoke(main, ["train", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert "lora    rank 8, alpha 16, 0.0" in done.stderr
    accuracy = [read_journal(run)[f"iter-{i:02d}/eval.validation"]["accuracy"] for i in (0, 2)]
    assert accuracy[1] > accuracy[0] + 0.1
    assert not (run / "iter-01" / "adapter").exists()  # run.keep = "last"
    assert {p.name for p in (run / "iter-02").iterdir()} >= {"adapter", "model"}
    assert not (run / "iter-02" / "masters.safetensors").exists()

    # The toy in transformers with the adapter of the run is the model that the run saved.
    config = json.loads((run / "iter-02" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "toy"
    toy = Path(minem.__file__).parent / "data" / "toy" / "model"
    adapted = peft.PeftModel.from_pretrained(referee(toy), run / "iter-02" / "adapter")
    model, tokenizer = minem.load(run / "iter-02" / "model")
    ids = torch.tensor([tokenizer.encode("2 + 2 = 4. 4 - 3 = 1.")])
    with torch.no_grad():
        assert_close(model(ids), adapted(ids).logits)


def test_what_is_published_holds_no_path_and_no_markup(tmp_path):
    """Of a local model, task or run only the last part of its path, and of a name what is no markup."""
    home = tmp_path / "home-of-me"
    shutil.copytree(Path(minem.__file__).parent / "data" / "toy", home / "my task")
    model = (home / "my task" / "model").rename(home / "base <b>")
    run = tmp_path / "run\n# <script>`x`"
    more = flags("run.iterations=1", "mstep.lora_rank=2", "sampler.filter=none", "sampler.budget=1")
    places = ["--model", str(model), "--task", str(home / "my task"), "--out", str(run)]
    done = CliRunner().invoke(main, ["train", *places, *more])
    assert done.exit_code == 0, done.output
    card = (run / "iter-01" / "model" / "README.md").read_text()
    assert 'base_model: "base-b-"\n' in card
    assert "\n# `run-script-x-`, iteration 1\n\n`base-b-` after 1 iteration(s)" in card
    assert "on `my-task` with" in card
    config = json.loads((run / "iter-01" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base-b-"
    published = [file for name in ("model", "adapter") for file in (run / "iter-01" / name).iterdir()]
    assert not [file for file in published if b"home-of-me" in file.read_bytes()]


# ------------------------------------------------------------------------------------------------- bad input


def test_an_adapter_is_no_model(folders, tmp_path):
    mstep = make_mstep(folders["qwen2"])
    assert mstep.lora is not None
    mstep.lora.save(tmp_path / "adapter", mstep.masters, "some/model")
    done = CliRunner().invoke(main, ["generate", "--model", str(tmp_path / "adapter"), "--prompt", "x"])
    assert done.exit_code == 2
    assert "adapter is a LoRA adapter, not a model; a run has both merged in the folder model beside it" in done.stderr


@pytest.mark.parametrize("setting", ["rank=-1", "alpha=0.0", "alpha=inf", "targets=gates_proj", "targets=''"])
def test_bad_settings_are_named(setting):
    with pytest.raises(UserError, match=rf"mstep\.lora_{setting.partition('=')[0]}"):
        load_config(overrides=[f"mstep.lora_{setting}"])


def test_a_rank_beyond_the_width_is_refused(folders):
    with pytest.raises(UserError, match=r"mstep.lora_rank is 49; the model's width of 48 is the most"):
        make_mstep(folders["qwen2"], lora_rank=49)
