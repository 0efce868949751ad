"""A run before it is made: what it needs of memory, samples, steps and disk, and whether that is here.

    minem train configs/toy.toml --dry-run
    minem train configs/toy.toml --dry-run --gpus 2 --device cpu

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

from minem.config import default_budget
from minem.console import Progress
from minem.device import free_memory
from minem.em.checkpoints import KEPT
from minem.em.estep import encode_prompt
from minem.em.loop import ROW_BYTES, TOKEN_BYTES, Experiment
from minem.em.packing import plan
from minem.files import shown_bytes
from minem.model.sizes import lora_parameters
from minem.planning import memory
from minem.runs.directory import default_path

if TYPE_CHECKING:
    from minem.config import Config


def dry_run(config: Config, progress: Progress, gpus: int = 1) -> dict[str, Any]:
    """What a run of this config would need, at most, as plain JSON values; bytes where nothing else is said.

    gpus: processes that make the run together; memory is that of one of them. On the CPU they share what is free.

    Raises what the run itself would for a config or an input that is wrong.
    """
    experiment = Experiment(config, progress, weights=False)
    model, dtype, device = experiment.model.config, experiment.dtype, experiment.device
    taken, free = process_bytes(device), free_memory(device)
    if device.type == "cpu":  # where the other processes, too, take as much as this one before they allocate anything
        free = max(0, free - (gpus - 1) * taken) // gpus
    counts, micro_batch = _iteration(experiment, gpus)
    work = _work(experiment, micro_batch, free)
    estep = memory.e_step(model, dtype, device.type, work)
    mstep = memory.m_step(model, dtype, device.type, work)
    if sum(mstep.values()) > memory.SAFE_SHARE * free:  # the run then gives the cache back before each M-step
        mstep["KV cache"] = 0
    disk = _disk(experiment, work, counts)
    counted = memory.parameters(model)
    advice = _memory_advice(experiment, work, sum(estep.values()), sum(mstep.values()), free) + _disk_advice(disk)
    return {
        "run": str(config.run.out or default_path(config)),
        "model": config.model.id,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "parallel": ("fsdp" if work.split else "ddp") if gpus > 1 else None,
        "parameters": {**vars(counted), "total": counted.total, "trained": work.adapters or counted.total},
        "work": vars(work),
        "memory": {
            "taken": taken,
            "e_step": estep,
            "m_step": mstep,
            "e_step_peak": taken + sum(estep.values()),
            "m_step_peak": taken + sum(mstep.values()),
            "free": free,
        },
        "iteration": counts,
        "disk": disk,
        "fits": not advice,
        "advice": advice,
    }


def process_bytes(device: torch.device) -> int:
    """What is taken before the run allocates anything: by this process on the CPU, by anyone on a GPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def _iteration(experiment: Experiment, gpus: int) -> tuple[dict[str, int], dict[str, Any]]:
    """How much there is to do in one iteration, at most; and the largest micro-batch of it, as fields of `Work`."""
    config, task = experiment.config, experiment.task
    sampler, mstep = config.sampler, config.mstep
    prompts = sorted(len(encode_prompt(experiment.tokenizer, question)) for question in task.train)
    # Of a part of the questions in each iteration, those with the longest prompts come at some time.
    prompts = prompts[-(config.run.questions_per_iteration or len(prompts)) :]
    draws = len(prompts) * (sampler.budget or default_budget(sampler.name))
    kept = draws if sampler.draws == "all" else len(prompts)
    lengths = [n + sampler.max_new_tokens - 1 for n in prompts] * (kept // len(prompts))
    steps = plan(
        lengths,
        batch_size=mstep.batch_size,
        pack_tokens=mstep.pack_tokens,
        epochs=mstep.epochs,
        seed=config.run.seed,
        iteration=1,
        ranks=gpus,
    )
    # Several processes have equally full micro-batches, but for one sequence.
    fair = math.ceil(sum(sorted(lengths)[-mstep.batch_size :]) / gpus) + (max(lengths) if gpus > 1 else 0)
    tokens = max(*lengths, min(mstep.pack_tokens, fair))
    counts = {
        "questions": len(prompts),
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


def _work(experiment: Experiment, micro_batch: Mapping[str, Any], free: int) -> memory.Work:
    """What the run asks of memory, with as many slots and as few recomputed blocks as `free` bytes allow."""
    sampler, mstep = experiment.config.sampler, experiment.config.mstep
    model, dtype, device = experiment.model.config, experiment.dtype, experiment.device.type
    prompt, new = experiment.longest
    work = memory.Work(
        slots=experiment.generator.slots,
        prompt=prompt,
        new=new,
        two_models=sampler.proposal == "base" and sampler.name != "rsm",
        adapters=lora_parameters(model, mstep.lora_rank, mstep.lora_targets),
        moments_kept=mstep.optimizer_state == "keep",
        **micro_batch,
    )
    ddp, fsdp = (
        memory.fitted(model, dtype, device, replace(work, split=split), free, mstep.checkpointing)
        for split in (False, True)
    )
    if work.ranks == 1 or mstep.parallel == "ddp":
        return ddp
    return fsdp if mstep.parallel == "fsdp" or not memory.trains(model, dtype, device, ddp, free) else ddp


def _disk(experiment: Experiment, work: memory.Work, counts: Mapping[str, int]) -> dict[str, int]:
    """Bytes that the finished run, or its largest moment before, takes on the disk; `free` of them are there."""
    run, model = experiment.config.run, experiment.model.config
    folder = experiment.base_folder
    others = sum(f.stat().st_size for f in folder.iterdir() if f.is_file() and f.suffix not in (".safetensors", ".bin"))
    weights = memory.parameters(model).total * experiment.dtype.itemsize + others + 4 * work.adapters
    # The old folder goes when the new one is there.
    models = run.iterations if run.keep == "all" else min(2, run.iterations)
    trained = work.adapters or memory.parameters(model).total
    # What the next M-step goes on from; and while one is under way, its checkpoints and the one that is being written.
    narrow = experiment.dtype.itemsize < 4
    kept = (4 * trained if narrow else 0) + (8 * trained if work.moments_kept else 0)
    state = kept * (run.init == "previous" and run.iterations > 1) + 12 * trained * (KEPT + 1)
    new = experiment.config.sampler.max_new_tokens
    # A block's rows stay until all blocks are done; what is accepted is written twice.
    rows = (2 * counts["draws"] + counts["accepted"] + run.iterations) * (ROW_BYTES + TOKEN_BYTES * new)
    path = Path(run.out or default_path(experiment.config)).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.is_dir())
    parts = {"models": models * weights, "checkpoints": state, "samples": rows * run.iterations}
    return parts | {"total": sum(parts.values()), "free": shutil.disk_usage(there).free}


def _memory_advice(experiment: Experiment, work: memory.Work, estep: int, mstep: int, free: int) -> list[str]:
    """What to change where a step does not fit: nothing, where both do."""
    advice = []
    if estep > free:
        halves = (work.slots >> n for n in range(1, work.slots.bit_length()))
        slots = next((n for n in halves if _e_step_bytes(experiment, replace(work, slots=n)) <= free), None)
        what = (
            f"set run.slots={slots} (now {work.slots})"
            if slots
            else "lower sampler.max_new_tokens and mstep.pack_tokens"
        )
        advice.append(
            f"the E-step needs {shown_bytes(estep)} and {shown_bytes(free)} are free: {what}, or take a smaller model"
        )
    if mstep > memory.SAFE_SHARE * free:
        share = f"{memory.SAFE_SHARE:.0%} of the {shown_bytes(free)} that are free"
        remedy = _remedy(experiment, work, free)
        advice.append(f"the M-step needs {shown_bytes(mstep)}, more than {share}: {remedy}")
    return advice


def _e_step_bytes(experiment: Experiment, work: memory.Work) -> int:
    return sum(memory.e_step(experiment.model.config, experiment.dtype, experiment.device.type, work).values())


def _remedy(experiment: Experiment, work: memory.Work, free: int) -> str:
    """The first change that makes the M-step fit, the mildest one first."""
    model, dtype, device = experiment.model.config, experiment.dtype, experiment.device.type
    layers = model.num_hidden_layers

    def fits(changed: memory.Work) -> bool:
        return memory.trains(model, dtype, device, changed, free)

    recomputed = replace(work, checkpointed=layers)
    if work.checkpointed < layers and fits(recomputed):
        return 'set mstep.checkpointing="auto"'
    longest = work.prompt + work.new
    for tokens in (*(n for n in (8192, 4096, 2048, 1024) if longest <= n < work.tokens), longest):
        changed = replace(recomputed, tokens=tokens, supervised=math.ceil(work.supervised * tokens / work.tokens))
        if tokens < work.tokens and fits(changed):
            return f"set mstep.pack_tokens={tokens} (now up to {work.tokens} tokens a micro-batch)" + (
                ' and mstep.checkpointing="auto"' if work.checkpointed < layers else ""
            )
    if work.ranks > 1 and not work.split and fits(replace(recomputed, split=True)):
        return 'set mstep.parallel="fsdp"'
    return "take a smaller model, more GPUs (--gpus), or a device with more memory"


def _disk_advice(disk: Mapping[str, int]) -> list[str]:
    if disk["total"] <= disk["free"]:
        return []
    total, free = shown_bytes(disk["total"]), shown_bytes(disk["free"])
    advice = "make room, choose another --out, or keep fewer models (run.keep, run.iterations)"
    return [f"the run writes up to {total} and {free} are free on the disk: {advice}"]


def _shown(number: int | None) -> str:
    return "" if number is None else shown_bytes(number)


def tables(result: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """The result as tables (columns, rows) for people."""
    memory_, counts, disk, parameters = (result[key] for key in ("memory", "iteration", "disk", "parameters"))
    parts = [*memory_["e_step"], *(part for part in memory_["m_step"] if part not in memory_["e_step"])]
    rows = [[part, *(_shown(memory_[step].get(part)) for step in ("e_step", "m_step"))] for part in parts]
    if result["work"]["micro_batches"] == 1:  # they grow while the activations go
        next(row for row in rows if row[0] == "gradients")[0] = "gradients beyond activations"
    rows.append(["taken already", shown_bytes(memory_["taken"]), shown_bytes(memory_["taken"])])
    rows.append(["at most", shown_bytes(memory_["e_step_peak"]), shown_bytes(memory_["m_step_peak"])])
    rows.append(["free or taken already", *[shown_bytes(memory_["free"] + memory_["taken"])] * 2])
    where = f"memory on {result['device']}, {result['dtype']}"
    if result["parallel"] is not None:
        where = f"memory of each of {result['work']['ranks']} processes ({result['parallel']}), {result['dtype']}"
    work = [[name.replace("_", " "), f"{count:,}"] for name, count in counts.items()]
    kinds = [[f"parameters, {kind}", f"{count:,}"] for kind, count in parameters.items()]
    return [
        ([result["model"], "number"], kinds),
        ([where, "E-step", "M-step"], rows),
        (["each iteration", "at most"], work),
        ([f"disk, {result['run']}", "at most"], [[part, shown_bytes(number)] for part, number in disk.items()]),
    ]
