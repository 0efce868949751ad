"""`minem doctor`: what this machine has, what each part will run on, a short self-test, and what to do about the rest.

    minem doctor
    minem doctor --json

The self-test compares what is computed here with references: the generator's log-probabilities with the trainer's
forward pass, the loss and its gradients with float64, drawn tokens with the probabilities that they should have; on a
GPU for both backends. Nothing is downloaded, and no token is ever shown, only whether there is one.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minem
from minem.data.prompts import messages
from minem.data.tasks import load_task
from minem.device import free_memory, limit_threads, pick_device, pick_dtype
from minem.em.scoring import agreement
from minem.files import shown_bytes
from minem.kernels import linear_cross_entropy, sample
from minem.kernels.backend import pick
from minem.model.decoder import takes_varlen
from minem.runs.record import package_versions

NEEDED = ("torch", "triton", "safetensors", "tokenizers", "huggingface-hub", "numpy", "jinja2", "pyarrow", "matplotlib")
OPTIONAL = ("transformers", "wandb", "trackio")  # the tests' referee; live tracking
LITTLE_DISK = 10 * 10**9
LOSS_ERROR = 1e-5  # of float32 against float64, relative to the largest number
DRAWN = 20_000  # tokens whose frequencies are looked at
CHI_SQUARE = 57.0  # 15 degrees of freedom pass it once in a million; the seeds are fixed, so it passes or it never does


def examine(device_name: str) -> dict[str, Any]:
    """Everything that the command prints: "machine", "parts", "checks", "advice" and "passed".

    Raises UserError where CUDA was asked for and is not there.
    """
    device = pick_device(device_name)
    machine = _machine()
    checks = [_checked(*check) for check in _checks(device)]
    passed = all(check["passed"] for check in checks)
    parts = _parts(device)
    return {
        "passed": passed,
        "machine": machine,
        "parts": parts,
        "checks": checks,
        "advice": list(_advice(machine, parts, passed)),
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The same for a terminal."""
    for title, rows in (("this machine", _shown_machine(found["machine"])), ("what runs on what", found["parts"])):
        yield title
        yield from (f"  {label:<14}{value}" for label, value in rows.items())
    yield "self-test"
    for check in found["checks"]:
        verdict = "ok  " if check["passed"] else "FAIL"
        yield f"  {verdict} {check['name']}: {check['detail']} ({check['seconds']:.1f} s)"
    if found["advice"]:
        yield "what to do"
        yield from (f"  - {sentence}" for sentence in found["advice"])


# ---------------------------------------------------------------------------------------------------- what is here


def _machine() -> dict[str, Any]:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "memory_free_bytes": free_memory(torch.device("cpu")),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "driver": Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists(),
        "cuda": torch.version.cuda,  # that torch was built for
        "versions": {"minem": minem.__version__, **package_versions((*NEEDED, *OPTIONAL))},
        "runs_free_bytes": _free_disk(Path("runs")),
        "hub_cache": str(cache),
        "hub_cache_free_bytes": _free_disk(cache),
        "hub_cache_bytes": sum(blob.stat().st_size for blob in cache.glob("*/blobs/*") if blob.is_file()),
        "hub_cache_models": len(list(cache.glob("models--*"))),
        "hub_cache_datasets": len(list(cache.glob("datasets--*"))),
        "hub_token": _has_token(),
        "hub_offline": constants.HF_HUB_OFFLINE,
    }


def _has_token() -> bool:
    from huggingface_hub import get_token

    try:
        return get_token() is not None
    except OSError:  # a file where HF_HOME should be a folder, or one that may not be read
        return False


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = [properties.major, properties.minor]
    return {"name": properties.name, "memory_bytes": total, "memory_free_bytes": free, "capability": capability}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _free_disk(folder: Path) -> int:
    """Of the disk that the folder is on, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _shown_machine(machine: dict[str, Any]) -> dict[str, str]:
    gpus = [
        f"{gpu['name']}, {shown_bytes(gpu['memory_bytes'])} ({shown_bytes(gpu['memory_free_bytes'])} free), "
        f"sm_{''.join(map(str, gpu['capability']))}"
        for gpu in machine["gpus"]
    ]
    versions = machine["versions"]
    missing = [name for name in OPTIONAL if name not in versions]
    return {
        "python": f"{machine['python']} on {machine['system']}",
        "CPU": f"{machine['cpu']}, {machine['cores']} core(s)",
        "memory": f"{shown_bytes(machine['memory_bytes'])}, {shown_bytes(machine['memory_free_bytes'])} free",
        **({f"GPU {index}": gpu for index, gpu in enumerate(gpus)} or {"GPU": "none that torch sees"}),
        "CUDA": f"torch was built for {machine['cuda']}" if machine["cuda"] else "torch was built without",
        "packages": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "not installed": f"{', '.join(missing) or 'nothing'} (optional)",
        "disk": f"{shown_bytes(machine['runs_free_bytes'])} free for ./runs",
        "hub cache": f"{machine['hub_cache']}: {machine['hub_cache_models']} model(s) and "
        f"{machine['hub_cache_datasets']} data set(s) of {shown_bytes(machine['hub_cache_bytes'])}, "
        f"{shown_bytes(machine['hub_cache_free_bytes'])} free",
        "hub token": "there is one" if machine["hub_token"] else "none",
    }


# ------------------------------------------------------------------------------------------------ what runs on what


def _parts(device: torch.device) -> dict[str, str]:
    dtype, cuda = pick_dtype("auto", device), device.type == "cuda"
    kernels = {"triton": "Triton", "eager": "eager PyTorch, their references"}
    flash = takes_varlen(torch.empty(1, 1, 64, dtype=dtype, device=device))
    if cuda:
        several = f"{torch.cuda.device_count()} here: --gpus N, nccl" if torch.cuda.device_count() > 1 else "one here"
    else:
        several = "none here; --gpus N --device cpu runs N processes, gloo"
    return {
        "device": f"{device.type}, weights in {str(dtype).removeprefix('torch.')}",
        "generator": "a CUDA graph for each batch size" if cuda else "step by step, eagerly",
        "kernels": kernels[pick(None, torch.empty(1, dtype=dtype, device=device))],
        "attention": "flash attention over packed sequences"
        if flash
        else "PyTorch's, sequences of one length together",
        "GPUs": several,
    }


# ---------------------------------------------------------------------------------------------------- the self-test


def _checks(device: torch.device) -> Iterator[tuple[str, Callable[[], tuple[bool, str]]]]:
    backends = ["eager", "triton"] if device.type == "cuda" else ["eager"]
    yield "generator against trainer", partial(_generator_agrees, device)
    for backend in backends:
        yield f"loss against float64, {backend}", partial(_loss_is_right, device, backend)
        yield f"sampling against its probabilities, {backend}", partial(_draws_are_right, device, backend)


def _checked(name: str, check: Callable[[], tuple[bool, str]]) -> dict[str, Any]:
    start = time.monotonic()
    try:
        passed, detail = check()
    except Exception as error:  # a broken driver or compiler says so in its own way, and that is what is wanted here
        passed, detail = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return {"name": name, "passed": passed, "detail": detail, "seconds": time.monotonic() - start}


def _generator_agrees(device: torch.device) -> tuple[bool, str]:
    """Draws of the embedded toy, their log-probabilities against one forward pass over whole sequences."""
    dtype = pick_dtype("auto", device)
    model, tokenizer = minem.load("toy", device, dtype)
    limit_threads(model)
    prompts = [tokenizer.chat(messages(question)) for question in load_task("toy", 16).test]
    params = minem.SamplingParams(n=2, max_new_tokens=48)
    drawn = minem.Generator(model, tokenizer, slots=16).generate(prompts, params)
    found = agreement(model, [draw for draws in drawn for draw in draws], pack_tokens=4096)
    found.require(dtype)
    detail = f"{found.tokens} drawn tokens differ by {found.difference:.2g} nats at most, mean KL {found.kl:.2g}"
    return found.tokens > 0, detail


def _loss_is_right(device: torch.device, backend: str) -> tuple[bool, str]:
    """Loss and gradients of 256 rows over 5,003 entries in float32, against plain PyTorch in float64."""
    numbers = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=numbers) for n in (256, 5_003))
    targets = torch.randint(5_003, (256,), generator=numbers)
    token_weights = torch.rand(256, generator=numbers)

    def graded(move: Callable[[Tensor], Tensor], loss: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [move(hidden).requires_grad_(), move(weight).requires_grad_()]
        value = loss(*inputs, targets.to(inputs[0].device), move(token_weights))
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
        return -(token_weights * (hidden @ weight.T).log_softmax(-1)[torch.arange(len(targets)), targets]).sum()

    wanted = graded(lambda tensor: tensor.double(), plain)
    ours = graded(lambda tensor: tensor.to(device), lambda *given: linear_cross_entropy(*given, backend=backend)[0])
    error = max(
        float((one.cpu().double() - other).abs().max() / other.abs().max())
        for one, other in zip(ours, wanted, strict=True)
    )
    return error <= LOSS_ERROR, f"loss and gradients are off by {error:.2g} of their largest value at most"


def _draws_are_right(device: torch.device, backend: str) -> tuple[bool, str]:
    """20,000 draws from one distribution of 16 tokens: how often each came, and the log-probabilities that are told."""
    logits = torch.randn(16, generator=torch.Generator().manual_seed(1)).to(device)
    rows = torch.arange(DRAWN, device=device)
    ones, none = torch.ones(DRAWN, device=device), torch.zeros_like(rows)
    tokens, logprobs, _ = sample(
        logits.expand(DRAWN, -1), ones, none, ones, 0 * ones, seeds=rows, positions=none, backend=backend
    )
    log_p = logits.double().log_softmax(-1)
    expected = log_p.exp() * DRAWN
    statistic = float(((torch.bincount(tokens, minlength=16) - expected) ** 2 / expected).sum())
    told = float((logprobs - log_p[tokens]).abs().max())
    passed = statistic <= CHI_SQUARE and told <= LOSS_ERROR and math.isfinite(told)
    return passed, f"chi-square {statistic:.1f} of 15 degrees of freedom, log-probabilities off by {told:.2g} at most"


# -------------------------------------------------------------------------------------------------------- what to do


def _advice(machine: dict[str, Any], parts: dict[str, str], passed: bool) -> Iterator[str]:
    versions, gpus = machine["versions"], machine["gpus"]
    if not passed:
        yield "a self-test failed: results of this machine cannot be trusted; try --device cpu, and report what it says"
    if machine["driver"] and not gpus:
        why = "was built without CUDA: pip install torch" if not machine["cuda"] else "cannot use it: update the driver"
        yield f"there is an NVIDIA driver, but torch {why}"
    if gpus and "triton" not in versions:
        yield "the kernels run on PyTorch alone: pip install triton"
    if any(gpu["capability"] < [8, 0] for gpu in gpus):
        yield "a GPU older than sm_80 is slow in bfloat16: --set model.dtype=float32"
    if gpus and len(gpus) > 1 and "nccl" in parts["GPUs"]:
        yield f"minem train --gpus {len(gpus)} uses all of the GPUs"
    for key, what in (("runs_free_bytes", "./runs"), ("hub_cache_free_bytes", "the hub cache (HF_HOME moves it)")):
        if machine[key] < LITTLE_DISK:
            yield f"{shown_bytes(machine[key])} are free for {what}: a 3B model takes 6 GB, a run has two for a moment"
    if machine["hub_offline"]:
        yield "HF_HUB_OFFLINE is set: only models and tasks in the hub cache can be used"
    elif not machine["hub_token"]:
        yield "gated models (Llama) need a token: set HF_TOKEN, or run `hf auth login`"
