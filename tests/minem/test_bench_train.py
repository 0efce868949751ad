"""The benchmark of training: its contestants do the same steps on the same rows and come to the same losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minem.config import MStepSection
from minem.model.decoder import Model
from minem.model.hf_config import ModelConfig
from tests.minem.folders import BASE

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import train

    return train


def test_the_contestants_come_to_the_same_losses(train, tmp_path):
    train.write_model(train.ALL_SHAPES["tiny"], tmp_path, "cpu", torch.float32)
    settings = MStepSection(lr=1e-3, batch_size=3, pack_tokens=600)
    job = train.Job(str(tmp_path), "cpu", 9, settings, answer=40, longest=200)
    names = ["minem", "transformers, padding", "transformers, padding, sorted"]
    results = {name: train.measure(name, job) for name in names}
    ours = results["minem"]
    assert len(ours["losses"]) == 3
    assert ours["losses"][0] - ours["losses"][-1] > 0.01  # there is something to agree on
    assert max(train.apart(results).values()) < 1e-5
    for result in results.values():
        assert result["seconds"] > 0
        assert result["loss"] < ours["losses"][0]


def test_a_step_has_the_examples_of_the_plan(train, tmp_path):
    """In the order of the shuffle, and each once."""
    import contestants

    from minem.em.packing import plan, shuffle

    settings = MStepSection(batch_size=4, pack_tokens=300)
    job = train.Job(str(tmp_path), "cpu", 10, settings)
    examples = [contestants.make_row(i, 512, 40, 200) for i in range(10)]
    steps = job.steps(examples)
    assert [i for step in steps for i in step] == shuffle(10, 0, 1, 0)
    planned = plan([len(e) for e in examples], batch_size=4, pack_tokens=300, epochs=1, seed=0, iteration=1)
    assert [sorted(step) for step in steps] == [step.examples for step in planned]


@pytest.mark.slow
def test_the_benchmark_of_training_runs():
    """Slow, since each contestant has a process of its own: its tables, profile and JSON come out of the command."""
    command = [sys.executable, BENCH / "train.py", "--shape", "tiny", "--rows", "24", "--repeats", "1"]
    done = subprocess.run([*command, "--profile", "--json"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "aten::" in done.stderr  # the profile
    result = json.loads(done.stdout.splitlines()[-1])["shapes"]["tiny"]
    assert {"minem", "transformers, padding"} <= result["contestants"].keys()
    for row in result["contestants"].values():
        assert row["tokens_per_second"] == pytest.approx(result["rows"]["tokens"] / row["seconds"])
        assert row["peak_bytes"] > 0


def test_flops_are_those_of_the_matrix_products(train):
    """Two operations for each weight and token forwards and four backwards, as PyTorch's own counter finds them."""
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig.from_dict({"model_type": "llama", **BASE})
    model = Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ids, rows = torch.arange(24), torch.arange(9, 24)
    with FlopCounterMode(display=False) as counter:
        loss, *_ = model(ids, lengths=[1] * 24, rows=rows, targets=ids[rows])
        loss.backward()
    norms = config.hidden_size * (2 * config.num_hidden_layers + 1)  # weights, but no matrices
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for name, count in counts.items() if "attention" not in name)  # of single tokens it is none
    assert products == train.flops(config, 24, 15) - 6 * norms * 24


def test_the_peak_is_found_by_the_words_of_the_name(train):
    assert train.peak_flops("NVIDIA H100 80GB HBM3") == train.peak_flops("NVIDIA H200") == 989e12
    assert train.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert train.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert train.peak_flops("NVIDIA A10") is None  # not an A100
    assert train.peak_flops(torch.device("cpu")) is None
