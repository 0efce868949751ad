"""The device: which one, in which dtype, how much memory it has and how fast it could be.

minem doctor
"""

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import torch

from minem.errors import UserError

SMALL = 10_000_000  # parameters: the toy's matrix products are too short for threads and for bfloat16


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a GPU, PyTorch's cache included, or in the machine's memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if sys.platform != "linux":
        return 1 << 62  # unknown
    (kilobytes,) = re.findall(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())
    return int(kilobytes) * 1024


def release_cached_memory(device: torch.device) -> None:
    """Return unused memory to the system, which PyTorch (GPU) and malloc (CPU, half of a run's peak) would keep."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc alone
        trim(0)


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most bytes held, by their kind: of tensors since the statistics were reset, or of this process so far."""
    if device.type == "cuda":
        return {"peak_gpu_memory": torch.cuda.max_memory_allocated(device)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_process_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, PyTorch, CUDA, cuBLAS or the C library ran out of memory; each has its own words for it."""
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    known = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return known or isinstance(error, MemoryError)


def pick_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda". Raises UserError for "cuda" without a CUDA device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device = 'cuda', but torch sees no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device, parameters: int) -> torch.dtype:
    """The dtype of the working weights of a model with that many parameters.

    "auto" is bfloat16 on a GPU, and on a CPU that multiplies it in hardware unless the model is as small as the toy.
    """
    fast = device.type == "cuda" or (parameters >= SMALL and multiplies_bfloat16())
    auto = torch.bfloat16 if fast else torch.float32
    return {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def set_deterministic(device: torch.device, wanted: bool) -> None:
    """Forbid or allow operations of a GPU that do not repeat bit for bit; at the start, as cuBLAS reads this once."""
    if device.type == "cuda":
        if wanted:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(wanted)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow, against bugs


def multiplies_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has instructions for products in bfloat16; elsewhere they are emulated, and slow. Linux alone."""
    return cpuinfo.exists() and re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpuinfo.read_text()) is not None


def limit_threads(model: torch.nn.Module) -> None:
    """One thread on the CPU for a model whose products are too short to share, unless OMP_NUM_THREADS is set."""
    parameters = list(model.parameters())
    small = sum(p.numel() for p in parameters) < SMALL
    if parameters[0].device.type == "cpu" and small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
