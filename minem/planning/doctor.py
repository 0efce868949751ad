"""`minem doctor`: what this machine has, what each part will run on, and a short self-test.

minem doctor
"""

import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

import minem
from minem.data.prompts import load_prompts
from minem.data.tasks import load_task
from minem.device import SMALL, free_memory, limit_threads, pick_device, pick_dtype
from minem.em.scoring import agreement
from minem.errors import reason
from minem.kernels.backend import pick
from minem.model.decoder import takes_varlen
from minem.planning.dryrun import free_disk
from minem.runs.record import package_versions

PACKAGES = "torch triton safetensors tokenizers huggingface-hub numpy jinja2 pyarrow pydantic matplotlib transformers"


def examine(device_name: str) -> dict[str, Any]:
    """All that the command prints: "machine", "parts", "checks" and "passed". UserError if there is no such device."""
    device = pick_device(device_name)
    check = _self_test(device)
    dtype = pick_dtype("auto", device, SMALL)
    flash = takes_varlen(torch.empty(1, 1, 64, dtype=dtype, device=device))
    parts = {
        "device": f"{device.type}, weights in {str(dtype).removeprefix('torch.')}",
        "kernels": pick(None, torch.empty(1, dtype=dtype, device=device)),
        "attention": "flash attention over packed sequences" if flash else "PyTorch's, one call per sequence length",
    }
    return {"passed": check["passed"], "machine": _machine(), "parts": parts, "checks": [check]}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The same for a terminal."""
    for title, rows in (("this machine", found["machine"]), ("what runs on what", found["parts"])):
        yield title
        for label, value in rows.items():
            text = decimal(value) if label.endswith("_bytes") else value
            yield f"  {label.removesuffix('_bytes').replace('_', ' '):<20}{text}"
    (check,) = found["checks"]
    yield "self-test"
    yield f"  {'ok  ' if check['passed'] else 'FAIL'} {check['name']}: {check['detail']} ({check['seconds']:.1f} s)"


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.*)", info.read_text() if info.exists() else "")
    gpus = {}
    for index in range(torch.cuda.device_count()):
        gpu, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        gpus[f"gpu_{index}"] = f"{gpu.name}, {decimal(total)} ({decimal(free)} free), sm_{gpu.major}{gpu.minor}"
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
    }


def _self_test(device: torch.device) -> dict[str, Any]:
    """Draws of the embedded toy: the generator's log-probabilities against the trainer's forward pass."""
    start, dtype, passed = time.monotonic(), pick_dtype("auto", device, 0), False
    try:
        model, tokenizer = minem.load("toy", device, dtype)
        limit_threads(model)
        prompts = [tokenizer.chat(load_prompts("toy").messages(question)) for question in load_task("toy", 16).test]
        params = minem.SamplingParams(n=2, max_new_tokens=48)
        drawn = minem.Generator(model, tokenizer, slots=16).generate(prompts, params)
        found = agreement(model, [draw for draws in drawn for draw in draws], pack_tokens=4096)
        found.require(dtype)
        detail = f"{found.tokens} drawn tokens differ by {found.difference:.2g} nats at most, mean KL {found.kl:.2g}"
        passed = True
    except Exception as error:  # a broken driver or compiler raises errors of its own, and they are the finding
        detail = f"{type(error).__name__}: {reason(error)}"
    name = "generator against trainer"
    return {"name": name, "passed": passed, "detail": detail, "seconds": time.monotonic() - start}
