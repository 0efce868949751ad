"""Who trains in bench/train.py: the job, minem, transformers' usual loop, and TRL's SFTTrainer.

python bench/train.py
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from generate import ARC
from models import config_of, random_model
from resources import Shape
from safetensors.torch import save_file

from minem.config import MStepSection
from minem.em.mstep import MStep, learning_rate, loss_divisor
from minem.em.packing import Example, plan
from minem.em.scoring import score
from minem.model.hf_config import ModelConfig
from minem.model.weights import checkpoint_views, load_model

ANSWER, LONGEST = 300, 1024  # tokens: the mean and the most
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


@dataclass(frozen=True)
class Job:
    """What one contestant is to do."""

    folder: str  # a Hugging Face folder: config.json and model.safetensors
    device: str
    rows: int
    settings: MStepSection
    profile: bool = False
    answer: int = ANSWER
    longest: int = LONGEST

    def examples(self) -> list[Example]:
        vocabulary = self.config.vocab_size
        return [make_row(i, vocabulary, self.answer, self.longest) for i in range(self.rows)]

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(json.loads((Path(self.folder) / "config.json").read_text()))

    def steps(self, examples: Sequence[Example]) -> list[list[int]]:
        """The examples of each optimizer step, in the order of the shuffle."""
        lengths = [1] * len(examples)  # micro-batches of one row, so that nothing is sorted by length
        one, size = self.settings.epochs, self.settings.batch_size
        planned = plan(lengths, batch_size=size, pack_tokens=1, epochs=one, seed=0, iteration=1)
        return [[i for micro_batch in step.micro_batches for i in micro_batch] for step in planned]


def change(settings: MStepSection, **changes: Any) -> MStepSection:
    """The settings with these values in place."""
    return settings.model_copy(update=changes)


def make_row(number: int, vocabulary: int, mean: int, longest: int) -> Example:
    """A prompt as long as one of ARC-Challenge's, an answer of log-normal length (sigma 0.6) with that mean."""
    numbers = random.Random(number)
    place = numbers.random() * (len(ARC) - 1)
    prompt = ARC[int(place)] + (place % 1) * (ARC[int(place) + 1] - ARC[int(place)])
    answer = min(longest, max(1, int(numbers.lognormvariate(math.log(mean) - 0.6**2 / 2, 0.6))))
    ids = [int(vocabulary * numbers.random() ** 4) for _ in range(round(prompt) + answer)]
    return Example(str(number), ids[: round(prompt)], ids[round(prompt) :])


@torch.no_grad()
def write_model(shape: Shape, folder: Path, device: str, dtype: torch.dtype) -> None:
    model = random_model(shape, device, dtype)
    save_file({k: v.cpu() for k, v in checkpoint_views(model).items()}, folder / "model.safetensors", {"format": "pt"})
    name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config_of(shape) | {"bos_token_id": 0, "torch_dtype": name}))


class Minem:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = load_model(Path(job.folder), job.device, DTYPES[job.device])
        self.mstep = MStep(self.model, job.settings)

    def epoch(self, examples: list[Example], lr: float) -> dict[str, Any]:
        self.mstep.config = change(self.job.settings, lr=lr)
        losses: list[float] = []
        done = self.mstep.run(examples, seed=0, iteration=1, on_step=lambda row: losses.append(row["loss"]))
        micro_batch = f"{done['micro_batches'] / done['steps']:.1f} a step"
        return {"losses": losses, "micro_batches": f"{micro_batch}, {done['checkpointed']} layers recomputed"}

    def loss(self, examples: list[Example]) -> float:
        scored = score(self.model, examples, self.job.settings.pack_tokens)
        return -sum(sum(logprobs) for logprobs, _ in scored) / sum(len(e.token_ids) for e in examples)


class Padded:
    """transformers' model, its loss, and the loop that people write around it."""

    sort = False

    def __init__(self, job: Job) -> None:
        from transformers import AutoModelForCausalLM

        self.job = job
        # float32 weights on a GPU, too: AdamW on bfloat16 ones would lose most of its updates.
        self.model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32).to(job.device).train()

    def micro_batches(self, examples: list[Example], members: list[int]) -> Iterator[list[Example]]:
        """Consecutive rows, as many as fit when padded."""
        rows = [examples[i] for i in members]
        if self.sort:
            rows.sort(key=len, reverse=True)
        some: list[Example] = []
        for row in rows:
            longest = max(len(r) for r in (*some, row)) + 1
            if some and longest * (len(some) + 1) > self.job.settings.pack_tokens:
                yield some
                some = []
            some.append(row)
        yield some

    def forward(self, rows: list[Example], divisor: float) -> torch.Tensor:
        """The summed loss of rows, divided."""
        longest = max(len(row) for row in rows) + 1
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            whole = torch.tensor(row.prompt_ids + row.token_ids)
            ids[i, : len(whole)], mask[i, : len(whole)] = whole, 1
            labels[i, len(row.prompt_ids) : len(whole)] = torch.tensor(row.token_ids)
        ids, mask, labels = (x.to(self.job.device) for x in (ids, mask, labels))
        low = torch.autocast("cuda", torch.bfloat16) if self.job.device == "cuda" else nullcontext()
        with low:
            result = self.model(
                input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=divisor, use_cache=False
            )
        return result.loss

    def epoch(self, examples: list[Example], lr: float) -> dict[str, Any]:
        settings, steps = change(self.job.settings, lr=lr), self.job.steps(examples)
        parameters = list(self.model.parameters())
        betas = (settings.beta1, settings.beta2)
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.0, fused=True)
        divisor = loss_divisor(examples, len(steps))
        losses, count = [], 0
        for number, members in enumerate(steps):
            sums = []
            for rows in self.micro_batches(examples, members):
                loss = self.forward(rows, divisor)
                loss.backward()
                sums.append(loss.detach())
                count += 1
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.param_groups[0]["lr"] = learning_rate(settings, number, len(steps))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(sum(sums)) * divisor / sum(len(examples[i].token_ids) for i in members))
        return {"losses": losses, "micro_batches": f"{count / len(steps):.1f} a step"}

    @torch.no_grad()
    def loss(self, examples: list[Example]) -> float:
        batches = self.micro_batches(examples, list(range(len(examples))))
        return sum(float(self.forward(rows, 1.0)) for rows in batches) / sum(len(e.token_ids) for e in examples)


class SortedPadded(Padded):
    sort = True


class Trl(Padded):
    """TRL's SFTTrainer, which packs; as many tokens a micro-batch as minem, about as many optimizer steps."""

    liger = False

    def epoch(self, examples: list[Example], lr: float) -> dict[str, Any]:
        from datasets import Dataset
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast
        from trl import SFTConfig, SFTTrainer

        settings, steps = self.job.settings, len(self.job.steps(examples))
        ids = [e.prompt_ids + e.token_ids for e in examples]
        masks = [[0] * len(e.prompt_ids) + [1] * len(e.token_ids) for e in examples]
        total, longest = sum(map(len, ids)), max(map(len, ids))
        accumulated = max(1, math.ceil(total / steps / settings.pack_tokens))
        options: dict[str, Any] = {"max_length": max(longest, math.ceil(total / steps / accumulated)), "packing": True}
        options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulated, "num_train_epochs": 1}
        options |= {"learning_rate": lr, "lr_scheduler_type": "cosine", "max_grad_norm": settings.clip}
        options |= {"warmup_steps": math.ceil(settings.warmup * steps), "completion_only_loss": True}
        options |= {"adam_beta1": settings.beta1, "adam_beta2": settings.beta2, "gradient_checkpointing": False}
        options |= {"use_liger_kernel": self.liger, "bf16": self.job.device == "cuda"}
        options |= {"use_cpu": self.job.device == "cpu", "logging_steps": 1, "save_strategy": "no"}
        options |= {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
        with tempfile.TemporaryDirectory() as folder:
            words = Tokenizer(WordLevel({"<0>": 0}, unk_token="<0>"))  # asked for, not used: rows are ids already
            words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", eos_token="<0>")
            rows = Dataset.from_dict({"input_ids": ids, "completion_mask": masks})
            trainer = SFTTrainer(
                self.model, SFTConfig(output_dir=folder, **options), train_dataset=rows, processing_class=words
            )
            trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return {"losses": losses, "micro_batches": f"{accumulated} a step, {len(losses)} steps; minem does {steps}"}


class Liger(Trl):
    liger = True


CONTESTANTS: dict[str, tuple[type[Minem | Padded], tuple[str, ...]]] = {
    "minem": (Minem, ()),
    "transformers, padding": (Padded, ("transformers",)),
    "transformers, padding, sorted": (SortedPadded, ("transformers",)),
    "TRL, packing": (Trl, ("trl",)),
    "TRL, packing, Liger": (Liger, ("trl", "liger_kernel")),
}
