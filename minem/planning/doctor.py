"""`minem doctor`: what this machine has, what each part will run on, and a short self-test.

minem doctor
"""

import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import minem
from minem.data.prompts import load_prompts
from minem.data.tasks import load_task
from minem.device import free_memory, limit_threads, pick_device, pick_dtype
from minem.em.scoring import agreement
from minem.files import shown_bytes
from minem.kernels import linear_cross_entropy, sample
from minem.kernels.backend import pick
from minem.model.decoder import takes_varlen
from minem.planning.dryrun import free_disk
from minem.runs.record import package_versions

PACKAGES = "torch triton safetensors tokenizers huggingface-hub numpy jinja2 pyarrow pydantic matplotlib transformers"
LOSS_ERROR = 1e-5  # of float32 against float64, relative to the largest number
DRAWN = 20_000  # tokens whose frequencies are tested
CHI_SQUARE = 57.0  # 15 degrees of freedom exceed it once in a million; the seeds are fixed


def examine(device_name: str) -> dict[str, Any]:
    """All that the command prints: "machine", "parts", "checks" and "passed". UserError if there is no such device."""
    device = pick_device(device_name)
    checks = [_checked(*check) for check in _checks(device)]
    passed = all(check["passed"] for check in checks)
    return {"passed": passed, "machine": _machine(), "parts": _parts(device), "checks": checks}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The same for a terminal."""
    for title, rows in (("this machine", found["machine"]), ("what runs on what", found["parts"])):
        yield title
        for label, value in rows.items():
            text = shown_bytes(value) if label.endswith("_bytes") else value
            yield f"  {label.removesuffix('_bytes').replace('_', ' '):<20}{text}"
    yield "self-test"
    for check in found["checks"]:
        yield f"  {'ok  ' if check['passed'] else 'FAIL'} {check['name']}: {check['detail']} ({check['seconds']:.1f} s)"


def _machine() -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    try:
        token = get_token() is not None
    except OSError:  # HF_HOME is a file, or may not be read
        token = False
    cache, info = Path(constants.HF_HUB_CACHE), Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.*)", info.read_text() if info.exists() else "")
    gpus = {f"gpu_{index}": _gpu(index) for index in range(torch.cuda.device_count())}
    driver = Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "memory_free_bytes": free_memory(torch.device("cpu")),
        **(gpus or {"gpu": "none that torch sees" + (", though an NVIDIA driver is installed" if driver else "")}),
        "torch_built_for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only",
        "minem": minem.__version__,
        **package_versions(PACKAGES.split()),
        "runs_free_bytes": free_disk(Path("runs")),
        "hub_cache": str(cache),
        "hub_cache_free_bytes": free_disk(cache),
        "hub_cache_bytes": sum(blob.stat().st_size for blob in cache.glob("*/blobs/*") if blob.is_file()),
        "hub_token": token,
        "hub_offline": constants.HF_HUB_OFFLINE,
    }


def _gpu(index: int) -> str:
    gpu, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
    return f"{gpu.name}, {shown_bytes(total)} ({shown_bytes(free)} free), sm_{gpu.major}{gpu.minor}"


def _parts(device: torch.device) -> dict[str, str]:
    dtype, cuda, gpus = pick_dtype("auto", device), device.type == "cuda", torch.cuda.device_count()
    flash = takes_varlen(torch.empty(1, 1, 64, dtype=dtype, device=device))
    return {
        "device": f"{device.type}, weights in {str(dtype).removeprefix('torch.')}",
        "generator": "a CUDA graph for each batch size" if cuda else "step by step, eagerly",
        "kernels": pick(None, torch.empty(1, dtype=dtype, device=device)),
        "attention": "flash attention over packed sequences" if flash else "PyTorch's, one call per sequence length",
        "several": f"--gpus N, nccl, N up to {gpus}" if cuda else "--gpus N --device cpu: N processes, gloo",
    }


def _checks(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Name, function and arguments of each self-test, which returns whether it passed and what it found."""
    yield "generator against trainer", _generator_agrees, device
    for backend in ("eager", "triton") if device.type == "cuda" else ("eager",):
        yield f"loss against float64, {backend}", _loss_is_right, device, backend
        yield f"sampling against its probabilities, {backend}", _draws_are_right, device, backend


def _checked(name: str, check: Callable[..., tuple[bool, str]], *arguments: Any) -> dict[str, Any]:
    start = time.monotonic()
    try:
        passed, detail = check(*arguments)
    except Exception as error:  # a broken driver or compiler raises errors of its own, and they are the finding
        passed, detail = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return {"name": name, "passed": passed, "detail": detail, "seconds": time.monotonic() - start}


def _generator_agrees(device: torch.device) -> tuple[bool, str]:
    """Draws of the embedded toy: their log-probabilities against the trainer's forward pass."""
    dtype = pick_dtype("auto", device)
    model, tokenizer = minem.load("toy", device, dtype)
    limit_threads(model)
    words = load_prompts("toy")
    prompts = [tokenizer.chat(words.messages(question)) for question in load_task("toy", 16).test]
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

    def graded(loss: Callable[..., Tensor], *to: Any) -> list[Tensor]:
        inputs = [tensor.to(*to).requires_grad_() for tensor in (hidden, weight)]
        value = loss(*inputs, targets.to(inputs[0].device), token_weights.to(*to))
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    wanted = graded(lambda h, w, t, s: functional.cross_entropy(h @ w.T, t, reduction="none") @ s, torch.float64)
    ours = graded(lambda *given: linear_cross_entropy(*given, backend=backend)[0], device)
    error = max(float((a.cpu().double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, wanted, strict=True))
    return error <= LOSS_ERROR, f"loss and gradients are off by {error:.2g} of their largest value at most"


def _draws_are_right(device: torch.device, backend: str) -> tuple[bool, str]:
    """20,000 draws from one distribution of 16 tokens: their frequencies, and the log-probabilities returned."""
    logits = torch.randn(16, generator=torch.Generator().manual_seed(1)).to(device)
    rows = torch.arange(DRAWN, device=device)
    ones, none = torch.ones(DRAWN, device=device), torch.zeros_like(rows)
    many = logits.expand(DRAWN, -1)
    tokens, logprobs, _ = sample(many, ones, none, ones, 0 * ones, seeds=rows, positions=none, backend=backend)
    log_p = logits.double().log_softmax(-1)
    expected = log_p.exp() * DRAWN
    statistic = float(((torch.bincount(tokens, minlength=16) - expected) ** 2 / expected).sum())
    off = float((logprobs - log_p[tokens]).abs().max())
    passed = statistic <= CHI_SQUARE and off <= LOSS_ERROR  # False for NaN
    return passed, f"chi-square {statistic:.1f} of 15 degrees of freedom, log-probabilities off by {off:.2g} at most"
