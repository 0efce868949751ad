"""What the kernels execute and move at the shapes of the four models, counted on their PTX, and launches of a step.

    python -m minem.kernels.counts --target sm_90

A part of the rows is run on random numbers and scaled to all of them: rows do not depend on one another.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from models import config_of
from resources import SHAPES, Shape
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import minem.kernels
from minem.generation import engine, kv_cache
from minem.generation.kv_cache import Groups
from minem.kernels import decode_attention, linear_cross_entropy, rms_norm, rotary, sample, swiglu
from minem.kernels.attention import ROWS
from minem.kernels.backend import triton
from minem.kernels.rope import CacheWrite
from minem.model import decoder
from minem.model.hf_config import ModelConfig
from tests.kernels.ptx.launch import EVERY, LAUNCHES

BATCH = 256


class Case(NamedTuple):
    """A call on `rows` of the rows that the variant is about, and the bytes that the whole needs at least."""

    kernel: str
    variant: str
    rows: int
    of: int
    floor_bytes: int
    call: Callable[[], object]
    whole: Callable[[], object] | None = None  # the call on all rows, where the CTAs are not in proportion to them


def count(case: Case) -> dict[str, Any]:
    total, scale = _total(case.call), case.of // case.rows
    whole = {name: total[name] * scale for name in ("bytes_read", "bytes_written", "ctas", "idle_ctas")}
    per_row = {"warp_instructions_per_row": total["warp_instructions"] // case.rows}
    if case.whole is not None:
        with patch.dict(EVERY, _attention_kernel=41):
            total = _total(case.whole)
        whole |= {name: total[name] for name in ("ctas", "idle_ctas")}
    return {"kernel": case.kernel, "variant": case.variant, **per_row, **whole}


def _total(call: Callable[[], object]) -> Counter[str]:
    del LAUNCHES[:]
    call()
    total = Counter[str]()
    for launch in LAUNCHES:
        total.update({name: value for name, value in vars(launch).items() if isinstance(value, int)})
    return total


def cases(shapes: Sequence[Shape] = SHAPES) -> Iterator[Case]:
    """All in bf16; of models that share a number the kernel depends on, the first."""
    for shape in shapes:
        yield from _attention(shape)
    for vocabulary in dict.fromkeys(shape.vocabulary for shape in shapes):
        yield from _sampling(vocabulary)
        yield _loss(vocabulary)
    for shape in shapes:
        yield from _elementwise(shape)


def _normal(*size: int) -> Tensor:
    """By numpy, whose numbers are the same on every processor."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal(size, dtype=np.float32)).bfloat16()


def _sampling(vocabulary: int) -> Iterator[Case]:
    logits, zero, one = _normal(1, vocabulary) * 3, torch.zeros(1), torch.ones(1)
    whole = zero.long()
    for name, k, p in (("plain", 0, 1.0), ("top-k 50", 50, 1.0), ("top-p 0.95", 0, 0.95)):
        stops = {"stop_ids": torch.tensor([1, 2]), "min_tokens": whole}
        draw = partial(sample, logits, one, whole + k, one * p, zero, whole, whole, **stops, backend="triton")
        for batch in (1, BATCH):
            yield Case("sample", f"{name}, B={batch}, V={vocabulary}", 1, batch, 2 * batch * vocabulary, draw)


def _loss(vocabulary: int) -> Case:
    def call() -> None:
        hidden, weight = _normal(1, 8).requires_grad_(), _normal(vocabulary, 8).requires_grad_()
        linear_cross_entropy(hidden, weight, torch.zeros(1, dtype=torch.int64), backend="triton")

    return Case("linear_cross_entropy", f"forward and backward, V={vocabulary}", 1, 1, 4 * vocabulary, call)


def _attention(shape: Shape) -> Iterator[Case]:
    """256 + 256 positions in use of 512 + 1,024; each prompt has as many draws as share a tile of queries."""
    n = max(1, ROWS * shape.kv_heads // shape.heads)

    def call(rows: int) -> None:
        cache: Any = SimpleNamespace(group_width=n, padding_slot=rows, device="cpu")
        groups = Groups.fixed(cache, rows, list(range(rows)), [row // n for row in range(rows)])
        size = (rows + 1, shape.kv_heads, 512, shape.head_dim)
        prefix = [torch.zeros(size, dtype=torch.bfloat16) for _ in "kv"]
        suffix = [torch.zeros(size[0], size[1], 1024, size[3], dtype=torch.bfloat16) for _ in "kv"]
        lengths = torch.tensor([256] * rows + [0])
        qkv = _normal(rows, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        angle = _normal(rows, shape.head_dim // 2)
        decode_attention(
            qkv, *prefix, lengths, groups.siblings, groups.sibling_index, *suffix, torch.full((rows,), 255),
            heads=shape.heads, cos=angle, sin=angle, prefix_rows=groups.prefix_rows, suffix_rows=groups.suffix_rows,
            backend="triton",
        )  # fmt: skip

    positions = BATCH * 256 + -(-BATCH // n) * 256
    floor = 4 * shape.kv_heads * shape.head_dim * (positions + BATCH) + 4 * BATCH * shape.heads * shape.head_dim
    variant = f"{shape.name}, B={BATCH}, 256 + 256 of 512 + 1024"
    yield Case("decode_attention", variant, 4, BATCH, floor, partial(call, 4), partial(call, BATCH))


def _elementwise(shape: Shape) -> Iterator[Case]:
    rows, name = 4, f"{shape.name}, B={BATCH}"
    x, weight, gate_up = _normal(rows, shape.width), _normal(shape.width), _normal(rows, 2 * shape.mlp_width)
    call: Callable[[], object] = partial(rms_norm, x, weight, 1e-6, x, backend="triton")
    yield Case("rms_norm", name, rows, BATCH, 8 * BATCH * shape.width, call)
    call = partial(swiglu, gate_up, backend="triton")
    yield Case("swiglu", name, rows, BATCH, 6 * BATCH * shape.mlp_width, call)
    qkv, angle = _normal(rows, shape.heads + 2 * shape.kv_heads, shape.head_dim), _normal(rows, shape.head_dim // 2)
    index = torch.arange(rows)
    cache = CacheWrite(*(torch.zeros(rows, shape.kv_heads, 64, shape.head_dim).bfloat16() for _ in "kv"), index, index)
    call = partial(rotary, qkv, angle, angle, shape.heads, cache=cache, backend="triton")
    floor = 2 * (2 * shape.heads + 5 * shape.kv_heads) * shape.head_dim * BATCH
    yield Case("rotary", name, rows, BATCH, floor, call)


# Operations of PyTorch that launch nothing: views and allocations.
NOTHING = (
    "view _unsafe_view as_strided slice select t transpose expand unsqueeze squeeze detach alias split "
    "split_with_sizes permute unbind empty empty_strided empty_like new_empty lift_fresh resize_"
)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[-1]
        self.launches[name] += name not in NOTHING.split()
        return function(*args, **(kwargs or {}))


def launches_of_a_step(shape: Shape, batch: int) -> Counter[str]:
    """What a decode step launches on a GPU, by name: the engine runs on tensors without memory (device "meta")."""

    def on_meta(values: Any, device: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(torch.as_tensor(values).shape, dtype=dtype, device="meta")

    def record(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        recorder.launches[function.fn.__name__] += 1

    recorder = _Recorder()
    patches = [patch.object(module, "upload", on_meta) for module in (engine, kv_cache, decoder)]
    patches.append(
        patch.object(kv_cache, "_zeros", lambda size, device, dtype: torch.empty(size, dtype=dtype, device="meta"))
    )
    patches.append(patch.object(triton.runtime.jit.JITFunction, "run", record))
    for module in pkgutil.iter_modules(minem.kernels.__path__):
        kernels = importlib.import_module(f"minem.kernels.{module.name}")
        if hasattr(kernels, "pick") and module.name != "backend":
            patches.append(patch.object(kernels, "pick", lambda backend, tensor: backend or "triton"))
    for each in patches:
        each.start()
    try:
        with torch.no_grad(), torch.device("meta"):
            model = decoder.Model(ModelConfig.from_dict(config_of(shape))).to(torch.bfloat16)
            decoder.inverse_frequencies.cache_clear()
            step = engine.Engine(model, [1, 2], batch, 512, 1024)
            groups = Groups.fixed(step.cache, batch, [], [])
            for _ in range(2):  # the first fills caches of what is the same in every step
                recorder.launches.clear()
                with recorder:
                    step._decode(groups, (512, 1024))
            decoder.inverse_frequencies.cache_clear()
    finally:
        for each in patches:
            each.stop()
    return +recorder.launches
