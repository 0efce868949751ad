"""A run before it is made: the memory, samples, steps and disk that it needs, and whether they are there.

    minem train configs/toy.toml --dry-run
    minem train configs/toy.toml --dry-run --gpus 2 --device cpu

The input is checked as a run would do it, but the weights stay on the disk and nothing is made. All numbers are upper
bounds: every attempt of the budget is made, and every draw reaches the limit.
"""

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from minem.config import Config
from minem.data.prompts import Prompts
from minem.data.tasks import Task
from minem.device import free_memory, pick_device
from minem.em.checkpoints import KEPT
from minem.em.loop import Experiment
from minem.em.packing import plan
from minem.em.samplers import prompts_of
from minem.model.sizes import SAFE_SHARE, parameters
from minem.planning.memory import Work, e_step, fitted, m_step, trains
from minem.runs.folder import default_path
from minem.runs.stages import row_bytes

KEYS = {  # to change if a part does not fit
    "E-step": "lower run.slots, sampler.max_new_tokens or mstep.pack_tokens",
    "M-step": 'lower mstep.pack_tokens or sampler.max_new_tokens, set mstep.checkpointing="auto" or mstep.lora_rank',
    "disk": 'lower run.iterations, set run.keep="last", or choose another --out',
}


def dry_run(config: Config, experiment: Experiment, longest: tuple[int, int], gpus: int = 1) -> dict[str, Any]:
    """What each process of a run needs at most, in bytes. longest: tokens of the longest prompt, most new tokens."""
    model, estep, device = experiment.mstep.model, experiment.estep, pick_device(config.run.device)
    taken, free = process_bytes(device), free_memory(device)
    if device.type == "cpu":  # the other processes, too, take as much as this one before they allocate anything
        free = max(0, free - (gpus - 1) * taken) // gpus
    counts, micro_batch = _iteration(config, experiment.task, estep.prompts, gpus)
    asked = Work(
        slots=estep.generators["plain"].slots,
        prompt=longest[0],
        new=longest[1],
        two_models=config.sampler.proposal == "base" and "hinted" in prompts_of(estep.sampler),
        adapters=experiment.mstep.trained_parameters if config.mstep.lora_rank else 0,
        narrow=model.stored_dtype.itemsize < 4,
        moments_kept=config.mstep.optimizer_state == "keep",
        **micro_batch,
    )
    shape = model.config, model.dtype, device.type
    work, parallel = fitted(*shape, asked, free, config.mstep.checkpointing), config.mstep.parallel
    if gpus > 1 and (parallel == "fsdp" or (parallel == "auto" and not trains(*shape, work, free))):
        work = fitted(*shape, replace(asked, split=True), free, config.mstep.checkpointing)
    drawing, training = e_step(*shape, work), m_step(*shape, work)
    if sum(training.values()) > SAFE_SHARE * free:  # the run then releases the cache before each M-step
        training["KV cache"] = 0
    e_bytes, m_bytes = sum(drawing.values()), sum(training.values())
    counted = parameters(model.config)
    trained = work.adapters or counted.total
    disk = _disk(config, counts, counted.total, trained, model.stored_dtype.itemsize)
    needs = {"E-step": (e_bytes, free), "M-step": (m_bytes, int(SAFE_SHARE * free))}
    needs["disk"] = (disk["total"], disk["free"])
    short = {part: f"{decimal(a)} of {decimal(b)}" for part, (a, b) in needs.items() if a > b}
    peaks = {"e_step_peak": taken + e_bytes, "m_step_peak": taken + m_bytes}
    return {
        "run": str(config.run.out or default_path(config)),
        "model": config.model.id,
        "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parallel": ("fsdp" if work.split else "ddp") if gpus > 1 else None,
        "parameters": {**vars(counted), "total": counted.total, "trained": trained},
        "work": vars(work),
        "memory": {"taken": taken, "e_step": drawing, "m_step": training, **peaks, "free": free},
        "iteration": counts,
        "disk": disk,
        "fits": not short,
        "advice": "; ".join(f"{part}: needs {sizes}; {KEYS[part]}" for part, sizes in short.items()),
    }


def process_bytes(device: torch.device) -> int:
    """Bytes taken before the run allocates anything: by this process on the CPU, by all processes on a GPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    status = Path("/proc/self/status")  # of Linux alone
    found = re.search(r"RssAnon:\s*(\d+)", status.read_text() if status.exists() else "")
    return int(found[1]) * 1024 if found else 0


def free_disk(folder: Path) -> int:
    """Bytes free on the disk that the folder is on, or will be."""
    path = folder.absolute()
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.is_dir())).free


def _iteration(config: Config, task: Task, prompts: Prompts, gpus: int) -> tuple[dict[str, int], dict[str, Any]]:
    """The most work of one iteration; and its largest micro-batch, as fields of `Work`."""
    sampler, mstep = config.sampler, config.mstep
    asked = sorted(len(prompts.trained(question)) for question in task.train)
    # With a part of the questions in each iteration, the longest prompts may come together.
    asked = asked[-(config.run.questions_per_iteration or len(asked)) :]
    draws = len(asked) * sampler.budget
    kept = draws if sampler.draws == "all" else len(asked)
    lengths = [n + sampler.max_new_tokens - 1 for n in asked] * (kept // len(asked))
    cut = {"batch_size": mstep.batch_size, "pack_tokens": mstep.pack_tokens, "epochs": mstep.epochs}
    steps = plan(lengths, **cut, seed=config.run.seed, iteration=1, ranks=gpus)
    # Several processes have equally full micro-batches, up to one sequence.
    fair = math.ceil(sum(sorted(lengths)[-mstep.batch_size :]) / gpus) + (max(lengths) if gpus > 1 else 0)
    tokens = max(*lengths, min(mstep.pack_tokens, fair))
    counts = {
        "questions": len(asked),
        "draws": draws,
        "tokens_drawn": draws * sampler.max_new_tokens,
        "accepted": kept,
        "optimizer_steps": len(steps),
        "micro_batches": sum(len(step.micro_batches) for step in steps),
        "tokens_trained": sum(lengths) * mstep.epochs,
        "answers_to_evaluate": len(task.validation) * (1 + config.eval.samples),
    }
    return counts, {
        "tokens": tokens,
        "supervised": min(tokens, math.ceil(tokens * sampler.max_new_tokens * len(lengths) / sum(lengths))),
        "micro_batches": max(len(step.micro_batches) for step in steps) // gpus,
        "ranks": gpus,
    }


def _disk(config: Config, counts: Mapping[str, int], weights: int, trained: int, itemsize: int) -> dict[str, int]:
    """About the bytes that the run takes on the disk, and the free ones. weights, trained: numbers of parameters."""
    run = config.run
    # What the next M-step starts from; during one, its checkpoints and the one that is being written.
    kept = trained * (4 * (itemsize < 4) + 8 * (config.mstep.optimizer_state == "keep"))
    state = kept * (run.init == "previous" and run.iterations > 1) + 12 * trained * (KEPT + 1)
    # A block's rows stay until all blocks are done; what is accepted is written twice.
    rows = (2 * counts["draws"] + counts["accepted"] + run.iterations) * run.iterations
    parts = {
        "models": weights * itemsize * (run.iterations if run.keep == "all" else min(2, run.iterations)),
        "checkpoints": state,
        "samples": row_bytes(rows, config.sampler.max_new_tokens),
    }
    return parts | {"total": sum(parts.values()), "free": free_disk(Path(run.out or default_path(config)))}


def tables(result: Mapping[str, Any]) -> list[tuple[list[str], list[list[Any]]]]:
    """The result as tables (columns, rows) for people."""
    memory = result["memory"]
    more = {"taken already": memory["taken"], "at most": 0, "free or taken already": memory["free"] + memory["taken"]}
    both = [memory[step] | more | {"at most": memory[f"{step}_peak"]} for step in ("e_step", "m_step")]
    parts = memory["e_step"] | memory["m_step"] | more
    rows = [[part, *(decimal(step[part]) if part in step else "" for step in both)] for part in parts]
    processes = f" of each of {result['work']['ranks']} processes ({result['parallel']})" if result["parallel"] else ""
    title = f"memory{processes} on {result['device']}, {result['dtype']}"
    return [
        ([result["model"], "number"], [[f"parameters, {kind}", n] for kind, n in result["parameters"].items()]),
        ([title, "E-step", "M-step"], rows),
        (["each iteration", "at most"], [[name.replace("_", " "), n] for name, n in result["iteration"].items()]),
        ([f"disk, {result['run']}", "at most"], [[part, decimal(size)] for part, size in result["disk"].items()]),
    ]
