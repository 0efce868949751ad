"""The numbers of a plan against the things themselves: counted parameters, saved tensors, and a run's real memory."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from minem.cli import main
from minem.model.decoder import Model
from minem.model.hf_config import ModelConfig
from minem.model.lora import LoRA
from minem.model.sizes import activation_bytes, parameters
from minem.model.weights import TOY
from minem.planning.memory import Work, fitted, trains
from tests.minem.folders import BASE, SHAPES, make_model


def shape(kind: str, **fields) -> ModelConfig:
    model_type, own = SHAPES[kind]
    return ModelConfig.from_dict({"model_type": model_type, **BASE, **own, **fields})


@pytest.mark.parametrize("kind", SHAPES)
def test_parameters_are_those_that_the_model_has(kind):
    config = shape(kind)
    model = Model(config)
    counted = parameters(config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    body = sum(p.numel() for module in (model.layers, model.norm) for p in module.parameters())
    assert (counted.embeddings, counted.body) == (model.embed.weight.numel(), body)


@pytest.mark.parametrize("options", list(itertools.product((False, True), repeat=5)), ids=str)
def test_parameters_under_every_option(options):
    names = ("tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm")
    config = dataclasses.replace(shape("llama-head-dim"), **dict(zip(names, options, strict=True)))
    with torch.device("meta"):
        model = Model(config)
    assert parameters(config).total == sum(p.numel() for p in model.parameters())


def test_parameters_of_published_models():
    """Totals as they are quoted for these checkpoints."""
    sys.path.insert(0, str(Path(__file__).parents[3] / "bench"))
    try:
        from memory import model_config
    finally:
        sys.path.pop(0)
    for name, total in {
        "Qwen2.5-0.5B": 494_032_768,
        "Qwen2.5-7B": 7_615_616_512,
        "Llama-3.2-1B": 1_235_814_400,
        "Llama-3.1-8B": 8_030_261_248,
        "Qwen3-0.6B": 596_049_920,
    }.items():
        assert parameters(model_config(name)).total == total


@pytest.mark.parametrize(
    ("kind", "targets"), [("llama-head-dim", "all"), ("qwen2", "q_proj, v_proj"), ("qwen3", "up_proj,up_proj")]
)
def test_adapters_are_those_that_peft_makes(kind, targets):
    peft = pytest.importorskip("peft")
    names = "all-linear" if targets == "all" else [name.strip() for name in targets.split(",")]
    made = peft.get_peft_model(make_model(kind), peft.LoraConfig(r=3, target_modules=names))
    counted = sum(p.numel() for p in made.parameters() if p.requires_grad)
    with torch.device("meta"):  # as a dry run makes them
        lora = LoRA(Model(shape(kind)), 3, 16.0, targets, 0, Path())
    assert sum(p.numel() for p in lora.named_parameters().values()) == counted


def saved_bytes(model: Model, lengths: list[int], rows: torch.Tensor) -> int:
    """Bytes of all memory that autograd keeps, the parameters apart."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes, held = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no address is given out twice
        return tensor

    ids = torch.arange(sum(lengths)) % model.config.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, lengths=lengths, rows=rows, targets=ids[rows])
    return sum(sizes.values())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("lengths", [[64] * 4, [64, 60, 50, 34, 30, 18]], ids=["alike", "uneven"])
def test_activations_are_those_that_autograd_keeps(kind, lengths):
    config = shape(kind, hidden_size=96, intermediate_size=256)
    model = Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    rows = torch.arange(sum(lengths) // 2)
    head = config.vocab_size * config.hidden_size * 4  # the gradient of the head: `loss_bytes` has it
    saved = saved_bytes(model, lengths, rows) - head
    planned = activation_bytes(config, sum(lengths), len(rows), 0, torch.float32, "cpu")
    assert planned == pytest.approx(saved, rel=0.06)


@given(st.lists(st.integers(0, 200_000_000_000), min_size=2, max_size=2), st.booleans(), st.booleans())
def test_more_memory_never_means_less_slots_or_more_recomputation(free, lora, keeps):
    config = shape("qwen3", hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, head_dim=128)
    adapters = 15_368_192 if lora else 0  # of rank 16
    work = Work(256, 256, 1024, 8192, 6553, micro_batches=2, adapters=adapters, moments_kept=keeps)
    less, more = (fitted(config, torch.bfloat16, "cuda", work, size, "auto") for size in sorted(free))
    assert less.slots <= more.slots
    assert less.checkpointed >= more.checkpointed
    for planned, size in zip((less, more), sorted(free), strict=True):
        if 0 < planned.checkpointed < 28:  # as few as fit, and no fewer would
            assert trains(config, torch.bfloat16, "cuda", planned, size)
            fewer = dataclasses.replace(planned, checkpointed=planned.checkpointed - 1)
            assert not trains(config, torch.bfloat16, "cuda", fewer, size)


# ------------------------------------------------------------------------------------------------------- the dry run


def dry_run(*flags: str) -> dict:
    done = CliRunner().invoke(main, ["train", "--dry-run", "--device", "cpu", "--json", *flags])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_a_dry_run_makes_nothing(tmp_path, monkeypatch):
    def read(source, target):
        raise AssertionError("a dry run reads no weights")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minem.model.weights._copy_rows", read)
    result = dry_run("--out", "runs/x")
    assert list(tmp_path.iterdir()) == []
    assert result["parameters"]["total"] == 790_400
    assert result["fits"] is True
    for step in ("e_step", "m_step"):
        memory = result["memory"]
        assert memory[f"{step}_peak"] == memory["taken"] + sum(memory[step].values())


def test_a_dry_run_counts_the_work_of_an_iteration():
    flags = ("--limit", "10", "--budget", "3", "--set", "mstep.batch_size=4", "--set", "mstep.epochs=2")
    first = dry_run(*flags)["iteration"]
    assert (first["questions"], first["draws"], first["accepted"]) == (10, 30, 10)
    assert first["tokens_drawn"] == 30 * 64
    assert first["optimizer_steps"] == 2 * 3
    every = dry_run(*flags, "--set", "sampler.draws=all")["iteration"]
    assert (every["accepted"], every["optimizer_steps"]) == (30, 2 * 8)


def test_processes_on_the_cpu_share_what_is_free_and_each_takes_its_own(monkeypatch):
    monkeypatch.setattr("minem.planning.dryrun.free_memory", lambda device: 10 * 2**30)
    for processes in (1, 2, 40):
        planned = dry_run("--limit", "10", "--gpus", str(processes))
        memory = planned["memory"]
        together = processes * max(memory["e_step_peak"], memory["m_step_peak"])
        if planned["fits"]:
            assert together <= 10 * 2**30 + memory["taken"]  # which this process has already
        assert planned["fits"] == (processes < 40)


def test_a_dry_run_knows_what_lora_trains():
    full, lora = dry_run(), dry_run("--set", "mstep.lora_rank=4", "--set", "mstep.lora_targets=q_proj,v_proj")
    assert full["parameters"]["trained"] == full["parameters"]["total"] == lora["parameters"]["total"]
    assert lora["parameters"]["trained"] == 4 * 4 * 2 * (128 + 128)  # rank, layers, targets, in + out
    for part in ("AdamW moments", "loss or backward"):
        assert lora["memory"]["m_step"][part] < full["memory"]["m_step"][part]


def test_a_dry_run_refuses_what_a_run_would_refuse(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TOY, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"intermediate_size": raw["intermediate_size"] - 2}))
    for flags, words in (
        (["--model", str(folder)], "the weights do not fit config.json"),
        (["--set", "sampler.max_new_tokens=600"], "lower sampler.max_new_tokens"),
        (["--task", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["--samples", "rows.jsonl"], "give either"),
        (["--gpus", "2", "--device", "cuda"], "--gpus 2"),
    ):
        done = CliRunner().invoke(main, ["train", "--dry-run", *flags])
        assert done.exit_code == 2
        assert words in done.stderr


def test_a_dry_run_names_the_keys_to_lower(monkeypatch):
    monkeypatch.setattr("minem.planning.dryrun.free_memory", lambda device: 80_000_000)
    flags = ("--set", "run.slots=8", "--set", "mstep.batch_size=512", "--set")
    short = dry_run(*flags, "mstep.pack_tokens=8192")
    assert short["fits"] is False
    assert short["advice"].startswith("M-step: needs ")  # the E-step and the disk are not named: they fit
    assert "lower mstep.pack_tokens" in short["advice"]
    fits = dry_run(*flags, "mstep.pack_tokens=512")
    assert (fits["fits"], fits["advice"]) == (True, "")
    monkeypatch.setattr("minem.planning.dryrun.free_memory", lambda device: 5_000_000)
    monkeypatch.setattr("minem.planning.dryrun.shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    nothing = CliRunner().invoke(main, ["train", "--dry-run", "--device", "cpu", "--limit", "10"])
    for key in ("E-step: needs", "run.slots", "M-step: needs", "mstep.lora_rank", "disk: needs", "run.keep"):
        assert key in nothing.stdout.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------- and the run


SETTINGS = (  # a few seconds of work, in two optimizer steps of two micro-batches each, so that all parts are there
    "sampler.filter=none",
    "sampler.max_new_tokens=24",
    "mstep.batch_size=24",
    "mstep.pack_tokens=512",
    "mstep.epochs=2",
    "eval.max_new_tokens=2",
    "eval.samples=0",
    "eval.diagnostics=0",
    "run.iterations=1",
    "run.slots=24",
)


def make_random_model(folder: Path) -> None:
    """59 M parameters as transformers makes them, with the toy's tokenizer, whose ids are the first of 16,384."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    raw = json.loads((TOY / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=16_384,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=raw["bos_token_id"],
        eos_token_id=raw["eos_token_id"],
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in TOY.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)


def largest(process: int) -> int:
    """Bytes of anonymous memory that the largest of a process and its descendants holds now; 0 once it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return 0
    own = sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    return max(own, *map(largest, map(int, children))) if children else own


def anonymous_peak(command: list[str], log: Path) -> int:
    """The most that the largest of a child process and its descendants holds, every 3 ms."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    peak = 0
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as child:
        while child.poll() is None:
            peak = max(peak, largest(child.pid))
            time.sleep(0.003)
    assert child.returncode == 0, log.read_text()
    return peak


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
@pytest.mark.parametrize(
    ("processes", "more"),
    [
        (1, ["mstep.checkpointing=off"]),
        (1, ["mstep.checkpointing=full", "mstep.optimizer_state=keep"]),
        (1, ["mstep.checkpointing=off", "mstep.lora_rank=16"]),
        (2, ["mstep.checkpointing=off", "mstep.parallel=ddp"]),
        (2, ["mstep.checkpointing=off", "mstep.parallel=fsdp"]),
    ],
    ids=str,
)
def test_the_plan_is_what_a_run_of_59_million_parameters_takes(tmp_path, processes, more):
    """The plan is within 15 % of the peak of anonymous memory.

    Slow, since only a model this large shows what the tensors take beside the interpreter and its libraries, and the
    peak is that of a whole run in processes of its own. The random model accepts nothing, so every draw is kept.
    """
    make_random_model(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--task", "toy", "--limit", "24", "--budget", "1", "--device", "cpu"]
    for setting in (*SETTINGS, *more):
        flags += ["--set", setting]
    flags += ["--out", str(tmp_path / "run"), "--gpus", str(processes)]
    # Also in a process of its own: what it takes before it begins is part of the plan.
    done = subprocess.run(
        [sys.executable, "-m", "minem", "train", *flags, "--dry-run", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout.splitlines()[-1])
    assert plan["parameters"]["total"] == 58_737_152
    peak = anonymous_peak([sys.executable, "-m", "minem", "train", *flags], tmp_path / "log")
    planned = max(plan["memory"]["e_step_peak"], plan["memory"]["m_step_peak"])
    print(f"{processes} x {' '.join(more)}: planned {planned / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB")
    assert planned == pytest.approx(peak, rel=0.15)
