"""The facts recorded beside every number (device, versions, date, commit), timing, and the device's own ceilings.

Imported by the other scripts here.

    python -c "import sys; sys.path.insert(0, 'bench'); from record import facts; print(facts())"
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import minem
from minem.model.hf_config import ModelConfig
from minem.model.sizes import parameters


def facts(*packages: str, device: str = "cpu") -> dict[str, str]:
    """Device, versions (of minem, torch, Python and the given packages, if installed), date and commit."""
    versions = [f"minem {minem.__version__}", f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    cpu = f"{processor()}, {torch.get_num_threads()} thread(s) on {os.cpu_count()} cores"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "others at work": f"load average {os.getloadavg()[0]:.1f}",
        "versions": ", ".join(versions),
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
    }


def processor() -> str:
    """The CPU's name on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def seconds(function: Callable[[], Any]) -> float:
    """The median time of a call, over a second or so of calls."""
    return medians({"": function})[""]


def medians(functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median time of a call of each. On a CPU they take turns, so that a busy machine slows them alike."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        run = partial(do_bench, warmup=200, rep=1000, return_mode="median")
        return {name: run(function) / 1e3 for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    deadline, rounds = time.perf_counter() + len(functions), 0
    while rounds < 6 or (time.perf_counter() < deadline and rounds < 200):
        rounds += 1
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes/s of a large copy, read and written bytes both counted; operations/s of a large matrix product)."""
    large = device == "cuda"
    source = torch.empty((1 << 30) if large else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if large else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * source.numel() / seconds(lambda: target.copy_(source)), 2 * n**3 / seconds(lambda: a @ b)


# Dense bfloat16 peak, FLOP/s, from NVIDIA's data sheets (half of what they print with sparsity). The first row whose
# words are all in torch's device name counts: the SXM form of a card comes last.
PEAK_FLOPS = (
    ("B200", 2250e12),
    ("H200 NVL", 836e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A40", 149.7e12),
    ("L40S", 362e12),
    ("L4", 121e12),
)


def peak_flops(device: torch.device | str) -> float | None:
    """The dense bfloat16 peak of a device, or of its CUDA name, in FLOP/s; None if it is not known (the CPU)."""
    if isinstance(device, torch.device):
        device = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    words = set(re.split(r"[\s\-]+", device))
    return next((peak for name, peak in PEAK_FLOPS if words.issuperset(name.split())), None)


def flops(config: ModelConfig, tokens: int, supervised: int) -> int:
    """Floating-point operations of forward and backward, as for MFU: 6 per weight and token.

    tokens: that enter the model. supervised: that reach the head, which has V x D weights, tied or not; the embeddings
    are only looked up. Attention and recomputation are not counted.
    """
    head = config.vocab_size * config.hidden_size
    return 6 * (parameters(config).body * tokens + head * supervised)
