"""The numbers of a plan against the things themselves: counted parameters, saved tensors, and a run's real memory."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from minem.memory import activation_bytes, flops, parameters, peak_flops
from minem.model import Model, ModelConfig
from tests.minem.folders import BASE, SHAPES


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


def test_flops_are_those_of_the_matrix_products():
    """Two operations for each weight and token forwards and four backwards, as PyTorch's own counter finds them."""
    from torch.utils.flop_counter import FlopCounterMode

    config = shape("llama", num_hidden_layers=2)
    model = Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ids, rows = torch.arange(24), torch.arange(9, 24)
    with FlopCounterMode(display=False) as counter:
        loss, *_ = model(ids, lengths=[1] * 24, rows=rows, targets=ids[rows])
        loss.backward()
    # Attention of sequences of one token is not one of them, and torch.mm(..., out=) is not seen by the counter: the
    # gradient of what enters the head.
    unseen = 2 * config.vocab_size * config.hidden_size * 15
    norms = config.hidden_size * (2 * config.num_hidden_layers + 1)  # weights, but no matrices
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for name, count in counts.items() if "attention" not in name)
    assert products + unseen == flops(config, 24, 15) - 6 * norms * 24


def test_the_peak_is_found_by_the_words_of_the_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA A10") is None  # not an A100
    assert peak_flops(torch.device("cpu")) is None


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
