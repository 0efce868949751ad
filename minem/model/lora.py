"""LoRA: train small low-rank terms beside frozen weights, then merge them into the weights that the generator reads.

    minem train --set mstep.lora_rank=16 --set mstep.lr=2e-4

A linear layer W becomes W + scale * B A with scale = alpha / rank, A [rank, in] random and B [out, rank] zero, so that
training starts at W itself (Hu et al. 2021, arXiv 2106.09685). Only A and B have gradients, float32 masters and AdamW's
state. A merged layer has an A and a B for each of its projections (`minem.model.weights.PARTS`).

The one set of weights holds W while A and B train, and W + scale * B A at all other times. Rounding does not accumulate
over iterations, because each merge starts from the base weights, read again from their file.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from minem.errors import UserError
from minem.model.decoder import Model
from minem.model.weights import PARTS, checkpoint_views, read_weights

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# The projections that can be trained, by their Hugging Face names.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Adapter(nn.Module):
    """The low-rank terms of one linear layer, in the module tree only during training.

    rows: output features of each projection of the layer, by its Hugging Face name. targets: those to train, by the
    last part of their names. width: input features of the layer.
    """

    def __init__(self, rows: Mapping[str, int], targets: list[str], width: int, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.rows = {_short(name): size for name, size in rows.items()}
        # In the order of the rows: a ParameterDict sorts its keys.
        self.names = {_short(name): name for name in rows if _short(name) in targets}
        self.A = nn.ParameterDict({short: torch.zeros(rank, width) for short in self.names})
        self.B = nn.ParameterDict({short: torch.zeros(self.rows[short], rank) for short in self.names})

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y [N, out] with scale * B (A x) added in place, for the layer's input x [N, in] and output y.

        Stacked A and block-diagonal B act for all projections of a merged layer: one product each, y rounded once.
        """
        down = torch.cat([self.A[short] for short in self.names])  # [targets * rank, in]
        up = [self.B[short] if short in self.names else y.new_empty(size, 0) for short, size in self.rows.items()]
        return y.addmm_(F.linear(x, down), torch.block_diag(*up).T, alpha=self.scale)


class LoRA:
    """The adapters of a model; its own parameters stay frozen.

    targets: names of TARGETS with commas, or "all". seed: of the random A, the same in every process. base: the folder
    of the model's current weights, from which each merge starts. UserError if the rank is above the model's width.
    """

    def __init__(self, model: Model, rank: int, alpha: float, targets: str, seed: int, base: Path):
        if rank > model.config.hidden_size:
            raise UserError(f"mstep.lora_rank is {rank}; the model's width of {model.config.hidden_size} is the most")
        self.model, self.rank, self.alpha, self.seed, self.base = model, rank, alpha, seed, base
        names = {name.strip() for name in targets.split(",")}
        self.scale, self.targets = alpha / rank, [name for name in TARGETS if "all" in names or name in names]
        self.adapters: dict[nn.Linear, Adapter] = {}
        model.requires_grad_(False)
        views = checkpoint_views(model)
        for name, linear in model.named_modules():
            if isinstance(linear, nn.Linear) and name.startswith("layers."):
                _, number, kind = name.split(".", 2)
                parts = [f"model.layers.{number}.{part}" for part in PARTS[kind]]
                if any(_short(part) in self.targets for part in parts):
                    rows = {part: len(views[f"{part}.weight"]) for part in parts}
                    adapter = Adapter(rows, self.targets, linear.in_features, rank, self.scale)
                    self.adapters[linear] = adapter.to(model.device, model.dtype)
        self.reset()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All A and B in the model's dtype, by their names in PEFT's files."""
        return adapter_parameters(nn.ModuleList(self.adapters.values()))

    @torch.no_grad()
    def reset(self) -> None:
        """Draw A again and set B to zero; the model must hold the base weights."""
        noise = torch.Generator().manual_seed(self.seed)
        for name, parameter in self.named_parameters().items():
            start = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=noise)
            parameter.copy_(start)
        self._merged = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While open, the model computes with base weights and adapters, each inside its own block's forward."""
        self._unmerge()
        with ExitStack() as stack:
            for linear, adapter in self.adapters.items():
                linear.add_module("lora", adapter)
                stack.callback(delattr, linear, "lora")
                stack.enter_context(linear.register_forward_hook(lambda own, x, y: own.lora(x[0], y)))
            yield

    @torch.no_grad()
    def merge(self, masters: Mapping[str, Tensor]) -> None:
        """Make the weights base + scale * B A, summed in float32 and rounded once; `masters`: A and B in float32."""
        self._unmerge()
        for name, weight in checkpoint_views(self.model).items():
            module = name.removesuffix(".weight")
            if (a := masters.get(_peft_name(module, "A"))) is not None:
                b = masters[_peft_name(module, "B")]
                weight.copy_(torch.addmm(weight.to(a.dtype), b, a, alpha=self.scale))
        self._merged = True

    def _unmerge(self) -> None:
        if self._merged:
            read_weights(self.model, self.base)
        self._merged = False

    def save(self, folder: Path, masters: Mapping[str, Tensor], base_model: str) -> None:
        """Write a folder that peft loads: `masters` in float32, and a config that names the base model."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted(self.targets),
            "bias": "none",
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {name: master.detach().contiguous() for name, master in masters.items()}
        save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
        (folder / ADAPTER_WEIGHTS).chmod((folder / "adapter_config.json").stat().st_mode)  # as in `weights.save`


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of all adapters attached to a model, by their names in PEFT's files."""
    return {
        _peft_name(name, letter): factors[short]
        for adapter in model.modules()
        if isinstance(adapter, Adapter)
        for short, name in adapter.names.items()
        for letter, factors in (("A", adapter.A), ("B", adapter.B))
    }


def _peft_name(module: str, letter: str) -> str:
    return f"base_model.model.{module}.lora_{letter}.weight"


def _short(name: str) -> str:
    return name.rpartition(".")[2]
