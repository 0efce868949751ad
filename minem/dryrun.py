"""A run before it is made: what it needs of memory, samples, steps and disk, and whether that is here.

    minem train configs/toy.toml --dry-run

The input is read and checked as a run would (config, task, prompts, tokenizer, the shapes of the weights), but the
weights stay on the disk, nothing is drawn and no directory is made. All numbers are the most that the run can come to:
as if every attempt of the budget were made, and every draw went on to the limit.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minem import memory
from minem.cache import fitting_slots, free_memory
from minem.em import Experiment
from minem.estep import encode_prompt
from minem.packing import plan
from minem.progress import Progress
from minem.run import default_path
from minem.samplers import default_budget

if TYPE_CHECKING:
    from minem.config import Config

TOKEN_BYTES = 12  # of samples.jsonl: the digits of a token's id, and the text that it stands for
ROW_BYTES = 400  # and of a row beside its tokens


def dry_run(config: Config, progress: Progress) -> dict[str, Any]:
    """What a run of this config would need, at most, as plain JSON values; bytes where nothing else is said.

    Raises what the run itself would for a config or an input that is wrong.
    """
    experiment = Experiment(config, progress, weights=False)
    model = experiment.model.config
    work, counts = _work(experiment)
    dtype, device = experiment.dtype, experiment.device
    taken, free = process_bytes(device), free_memory(device)
    estep = memory.e_step(model, dtype, device.type, work)
    mstep = memory.m_step(model, dtype, device.type, work)
    if sum(mstep.values()) > free:  # the run then gives the cache back before each M-step
        mstep["KV cache"] = 0
    disk = _disk(experiment, counts)
    counted = memory.parameters(model)
    result = {
        "run": str(config.run.out or default_path(config)),
        "model": config.model.id,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": {**vars(counted), "total": counted.total, "trained": work.adapters or counted.total},
        "work": vars(work),
        "memory": {
            "process": taken,
            "e_step": estep,
            "m_step": mstep,
            "e_step_peak": taken + sum(estep.values()),
            "m_step_peak": taken + sum(mstep.values()),
            "free": free,
        },
        "iteration": counts,
        "disk": disk,
    }
    advice = _memory_advice(experiment, work, sum(estep.values()), sum(mstep.values()), free) + _disk_advice(disk)
    return result | {"fits": not advice, "advice": advice}


def process_bytes(device: torch.device) -> int:
    """What is taken before the run allocates anything: by this process on the CPU, by anyone on a GPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def _work(experiment: Experiment) -> tuple[memory.Work, dict[str, int]]:
    """What the run asks of memory, and how much there is to do in one iteration."""
    config, model, task = experiment.config, experiment.model.config, experiment.task
    sampler, mstep = config.sampler, config.mstep
    budget = sampler.budget or default_budget(sampler.name)
    draws = len(task.train) * budget
    kept = draws if sampler.draws == "all" else len(task.train)
    prompts = [len(encode_prompt(experiment.tokenizer, question)) for question in task.train]
    lengths = [n + sampler.max_new_tokens - 1 for n in prompts] * (kept // len(prompts))
    steps = plan(
        lengths,
        batch_size=mstep.batch_size,
        pack_tokens=mstep.pack_tokens,
        epochs=mstep.epochs,
        seed=config.run.seed,
        iteration=1,
    )
    tokens = max(*lengths, min(mstep.pack_tokens, sum(sorted(lengths)[-mstep.batch_size :])))
    two_models = sampler.proposal == "base" and sampler.name != "rsm"
    work = memory.Work(
        slots=experiment.generator.slots,
        prompt=experiment.longest[0],
        new=experiment.longest[1],
        tokens=tokens,
        supervised=math.ceil(tokens * sampler.max_new_tokens * len(lengths) / sum(lengths)),
        micro_batches=max(len(step.micro_batches) for step in steps),
        two_models=two_models,
    )
    held = memory.e_step(model, experiment.dtype, experiment.device.type, work)
    room = free_memory(experiment.device) - sum(n for part, n in held.items() if part not in ("KV cache", "generator"))
    work = replace(
        work, slots=fitting_slots(model, experiment.dtype, work.slots, work.prompt - 1, work.new, max(0, room))
    )
    return work, {
        "questions": len(task.train),
        "draws": draws,
        "tokens_drawn": draws * sampler.max_new_tokens,
        "accepted": kept,
        "optimizer_steps": len(steps),
        "micro_batches": sum(len(step.micro_batches) for step in steps),
        "tokens_trained": sum(lengths) * mstep.epochs,
        "evaluated": len(task.validation) * (1 + config.eval.samples),
    }


def _disk(experiment: Experiment, counts: Mapping[str, int]) -> dict[str, int]:
    """Bytes that the finished run, or its largest moment before, takes on the disk; `free` of them are there."""
    run, model = experiment.config.run, experiment.model.config
    folder = experiment.base_folder
    others = sum(f.stat().st_size for f in folder.iterdir() if f.is_file() and f.suffix not in (".safetensors", ".bin"))
    weights = memory.parameters(model).total * experiment.dtype.itemsize + others
    # The old folder goes when the new one is there.
    models = run.iterations if run.keep == "all" else min(2, run.iterations)
    masters = 0
    if experiment.dtype.itemsize < 4 and run.init == "previous":
        masters = 4 * memory.parameters(model).total * min(2, run.iterations - 1)
    new = experiment.config.sampler.max_new_tokens
    # A block's rows stay until all blocks are done; what is accepted is written twice.
    rows = (2 * counts["draws"] + counts["accepted"] + run.iterations) * (ROW_BYTES + TOKEN_BYTES * new)
    path = Path(run.out or default_path(experiment.config)).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.is_dir())
    parts = {"models": models * weights, "masters": masters, "samples": rows * run.iterations}
    return parts | {"total": sum(parts.values()), "free": shutil.disk_usage(there).free}


def _memory_advice(experiment: Experiment, work: memory.Work, estep: int, mstep: int, free: int) -> list[str]:
    """What to change where a step does not fit: nothing, where both do."""
    advice = []
    if estep > free:
        advice.append(
            f"the E-step needs {size(estep)} and {size(free)} are free: lower run.slots (now {work.slots}) or "
            "sampler.max_new_tokens, or take a smaller model"
        )
    if mstep > free:
        advice.append(f"the M-step needs {size(mstep)} and {size(free)} are free: {_remedy(experiment, work, free)}")
    return advice


def _remedy(experiment: Experiment, work: memory.Work, free: int) -> str:
    """The first change that makes the M-step fit, the mildest one first."""
    model, dtype, device = experiment.model.config, experiment.dtype, experiment.device.type
    longest = work.prompt + work.new
    packs = [n for n in (4096, 2048, 1024) if longest <= n < work.tokens]

    def fits(changed: memory.Work) -> bool:
        parts = memory.m_step(model, dtype, device, changed)
        return sum(parts.values()) - parts["KV cache"] <= free

    for tokens in (*packs, longest):
        changed = replace(work, tokens=tokens, supervised=work.supervised * tokens // work.tokens)
        if tokens < work.tokens and fits(changed):
            return f"set mstep.pack_tokens={tokens} (micro-batches of now {work.tokens} tokens)"
    return "take a smaller model, or a device with more memory"


def _disk_advice(disk: Mapping[str, int]) -> list[str]:
    if disk["total"] <= disk["free"]:
        return []
    return [
        f"the run writes up to {size(disk['total'])} and {size(disk['free'])} are free on the disk: make room, "
        "choose another --out, or keep fewer models (run.keep, run.iterations)"
    ]


def size(number: int) -> str:
    """Bytes, as a person reads them: 1234567 -> "1.2 MB"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number} B"


def tables(result: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """The result as tables (columns, rows) for people."""
    memory_, counts, disk, parameters = (result[key] for key in ("memory", "iteration", "disk", "parameters"))
    parts = [*memory_["e_step"], *(part for part in memory_["m_step"] if part not in memory_["e_step"])]
    rows = [
        [part, *(size(memory_[step][part]) if part in memory_[step] else "" for step in ("e_step", "m_step"))]
        for part in parts
    ]
    rows.append(["taken already", size(memory_["process"]), size(memory_["process"])])
    rows.append(["at most", size(memory_["e_step_peak"]), size(memory_["m_step_peak"])])
    rows.append(["free or taken already", *[size(memory_["free"] + memory_["process"])] * 2])
    where = f"memory on {result['device']}, {result['dtype']}"
    work = [[name.replace("_", " "), f"{count:,}"] for name, count in counts.items()]
    kinds = [[f"parameters, {kind}", f"{count:,}"] for kind, count in parameters.items()]
    return [
        ([result["model"], "number"], kinds),
        ([where, "E-step", "M-step"], rows),
        (["each iteration", "at most"], work),
        ([f"disk, {result['run']}", "at most"], [[part, size(number)] for part, number in disk.items()]),
    ]
