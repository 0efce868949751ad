"""What training goes on from, on the disk: float32 masters, AdamW's moments, and how far an M-step has come.

    iter-02/checkpoint.120/  state-00000.safetensors  state-00001.safetensors  ...  state.json

Tensors are written whole, under the names of the weights, so that any number of processes goes on from what any other
number wrote. At no time is more of them whole in memory than one file holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minem.errors import UserError, some
from minem.model.tokenizer import read_json
from minem.parallel.sharding import assign, complete

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of each weight, by its names in torch
FILE_BYTES = 2 * 2**30  # of one file, about
JSON_LIMIT = 64 * 2**20


def write(
    folder: Path | None,
    masters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.AdamW | None,
    history: Sequence[Sequence[float]],
) -> None:
    """Write masters, the optimizer's moments where there is one, and a line of numbers for each update so far.

    Every process has to call it, as the parts of distributed tensors are collected; all but one give no folder.
    """
    parts = [(f"{MASTER}.{name}", master) for name, master in masters.items()]
    if optimizer is not None:
        parts += [(f"{kind}.{name}", optimizer.state[m][kind]) for kind in MOMENTS for name, m in masters.items()]
    file: dict[str, torch.Tensor] = {}
    files = 0
    for key, part in parts:
        whole = complete(part.detach())
        if folder is None:
            continue
        file[key] = whole.cpu().contiguous()
        if key == parts[-1][0] or sum(tensor.nbytes for tensor in file.values()) >= FILE_BYTES:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(file, folder / f"state-{files:05d}.safetensors")
            file, files = {}, files + 1
    if folder is not None:
        text = json.dumps({"updates": _updates(optimizer), "history": history})
        (folder / "state.json").write_text(text, encoding="utf-8")


@torch.no_grad()
def read(
    folder: Path, masters: Mapping[str, torch.Tensor], new_optimizer: Callable[[], torch.optim.AdamW]
) -> tuple[torch.optim.AdamW | None, list[list[Any]]]:
    """Set the masters to what `write` wrote; returns an optimizer with its moments, if it has any, and the history.

    Raises UserError if it is of another model.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("state-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    state = read_json(folder / "state.json", JSON_LIMIT)
    optimizer = new_optimizer() if state["updates"] else None
    wanted = {f"{kind}.{name}" for kind in (MASTER, *(MOMENTS if optimizer else ())) for name in masters}
    if odd := sorted(wanted ^ found.keys()):
        raise UserError(f"{folder}: master weights of another model; these names differ: {some(odd)}")
    for path in sorted(set(found.values())):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                kind, _, name = key.partition(".")
                master, value = masters[name], file.get_tensor(key)
                if value.shape != master.shape:
                    raise UserError(f"{folder}: {key} has the shape {tuple(value.shape)}, not {tuple(master.shape)}")
                if optimizer is None or kind == MASTER:
                    assign(master, value)
                    continue
                moments = optimizer.state[master]
                moments.setdefault("step", torch.tensor(float(state["updates"]), device=master.device))
                moments[kind] = torch.empty_like(master, requires_grad=False)
                assign(moments[kind], value)
    return optimizer, state["history"]


def _updates(optimizer: torch.optim.AdamW | None) -> int:
    """How many updates AdamW's state has seen."""
    if optimizer is None or not optimizer.state:
        return 0
    return int(next(iter(optimizer.state.values()))["step"])
