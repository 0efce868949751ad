"""One epoch of an M-step beside transformers with padding and TRL's SFTTrainer: tokens/s, MFU and peak memory.

    python bench/train.py                              # on the CPU: a model of 26 M parameters, minutes on two cores
    python bench/train.py --json                       # the same as one line of JSON, the last
    python bench/train.py --shape qwen2.5-3b --json    # on a GPU: the shapes of real models, 16,384 tokens packed
    python bench/train.py --profile                    # and where the time of one of minem's steps goes

All start from the same random weights and train on the same rows: prompts as long as those of ARC-Challenge, answers of
log-normal length, tokens drawn unevenly so that there is something to learn. minem and transformers do the very same
optimizer steps, whose losses must agree, or this exits with 1. transformers gets the usual loop: rows padded on the
right to the longest of their micro-batch, labels of -100 where nothing is supervised, its own loss, torch's fused
AdamW; on a GPU float32 weights under bfloat16 autocast, which is what minem's float32 masters are. Its micro-batches
hold as many tokens as minem's, padding included; once in the order of the shuffle, and once, which costs nothing
either, sorted by length inside each step. Where that does not fit on a GPU, it gets half as many, and half again.
TRL packs before it forms steps, so that its steps are others and their number may be, too; its loss at the end, over
all rows, is shown and not held against the others'.

Only real tokens count in tokens/s. FLOPs are 6 x (body parameters x all tokens + head parameters x supervised ones),
attention and recomputation not counted. Each contestant runs in a process of its own: its memory is the peak during
training (on a GPU what PyTorch's allocator gave out, weights included; on the CPU anonymous memory, sampled, above what
the process held when all was imported). One step at a learning rate of 0 comes first and is not timed.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import rich.table
import torch
from generate import ARC, failed, synchronize
from memory import resident
from models import config_of, random_model
from record import ceilings, facts
from rich.console import Console
from safetensors.torch import save_file

from minem.config import MStepSection
from minem.device import peak_flops
from minem.em.mstep import MStep, learning_rate, loss_divisor
from minem.em.packing import Example, plan
from minem.em.scoring import score
from minem.kernels.resources import SHAPES, Shape
from minem.model.hf_config import ModelConfig
from minem.model.sizes import flops
from minem.model.weights import checkpoint_views, load_model

ALL_SHAPES = {
    "tiny": Shape("small", 64, 4, 2, 16, 128, 512),  # for the tests
    "small": Shape("small", 512, 8, 4, 64, 1408, 16_384),
    **{shape.name: shape for shape in SHAPES},
}
ANSWER, LONGEST = 300, 1024  # tokens: the mean and the most
AGREE = {"float32": 1e-4, "bfloat16": 2e-2}  # how far apart the losses of a step may be, relatively


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

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def steps(self, examples: Sequence[Example]) -> list[list[int]]:
        """The examples of each optimizer step, in the order of the shuffle."""
        lengths = [1] * len(examples)  # micro-batches of one row, so that nothing is sorted by length
        one, size = self.settings.epochs, self.settings.batch_size
        planned = plan(lengths, batch_size=size, pack_tokens=1, epochs=one, seed=0, iteration=1)
        return [[i for micro_batch in step.micro_batches for i in micro_batch] for step in planned]


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


# -------------------------------------------------------------------------------------------------------- contestants


class Minem:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = load_model(Path(job.folder), job.device, job.dtype)
        self.mstep = MStep(self.model, job.settings)

    def epoch(self, examples: list[Example], lr: float) -> dict[str, Any]:
        self.mstep.config = replace(self.job.settings, lr=lr)
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
        settings, steps = replace(self.job.settings, lr=lr), self.job.steps(examples)
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
        rows = [
            {
                "input_ids": e.prompt_ids + e.token_ids,
                "completion_mask": [0] * len(e.prompt_ids) + [1] * len(e.token_ids),
            }
            for e in examples
        ]
        total, longest = sum(len(e) + 1 for e in examples), max(len(e) + 1 for e in examples)
        accumulated = max(1, math.ceil(total / steps / settings.pack_tokens))
        with tempfile.TemporaryDirectory() as folder:
            arguments = SFTConfig(
                output_dir=folder,
                packing=True,
                max_length=max(longest, math.ceil(total / steps / accumulated)),
                per_device_train_batch_size=1,
                gradient_accumulation_steps=accumulated,
                num_train_epochs=1,
                learning_rate=lr,
                lr_scheduler_type="cosine",
                warmup_steps=math.ceil(settings.warmup * steps),
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                max_grad_norm=settings.clip,
                completion_only_loss=True,
                gradient_checkpointing=False,
                use_liger_kernel=self.liger,
                bf16=self.job.device == "cuda",
                use_cpu=self.job.device == "cpu",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            words = Tokenizer(WordLevel({"<0>": 0}, unk_token="<0>"))  # asked for, not used: rows are ids already
            words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", eos_token="<0>")
            trainer = SFTTrainer(self.model, arguments, train_dataset=Dataset.from_list(rows), processing_class=words)
            trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return {
            "losses": losses,
            "micro_batches": f"{accumulated} a step, {len(losses)} steps where minem does {steps}",
        }


class Liger(Trl):
    liger = True


CONTESTANTS: dict[str, tuple[type[Minem | Padded], tuple[str, ...]]] = {
    "minem": (Minem, ()),
    "transformers, padding": (Padded, ("transformers",)),
    "transformers, padding, sorted": (SortedPadded, ("transformers",)),
    "TRL, packing": (Trl, ("trl",)),
    "TRL, packing, Liger": (Liger, ("trl", "liger_kernel")),
}


# ---------------------------------------------------------------------------------------------------------- measuring


@contextmanager
def peak_memory(device: str, before: int) -> Iterator[dict[str, int]]:
    """The most bytes held while open: on a GPU by PyTorch's allocator, else anonymous ones less those of `before`."""
    found = {"peak": 0}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield found
        found["peak"] = torch.cuda.max_memory_allocated()
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            found["peak"] = max(found["peak"], resident("RssAnon") - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def measure(name: str, job: Job) -> dict[str, Any]:
    """Train one epoch; called in a fresh process."""
    kind, packages = CONTESTANTS[name]
    if packages:
        import transformers
        from transformers import LlamaForCausalLM, Qwen2ForCausalLM  # noqa: F401 (loads what is loaded lazily)

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    examples = job.examples()
    before = resident("RssAnon")
    contestant = kind(job)
    first = [examples[i] for i in job.steps(examples)[0]]
    contestant.epoch(first, 0.0)  # compiles what is compiled, and leaves the weights as they are
    with peak_memory(job.device, before) as memory:
        synchronize()
        start = time.perf_counter()
        result = contestant.epoch(examples, job.settings.lr)
        synchronize()
        seconds = time.perf_counter() - start
    result |= {"seconds": seconds, "peak_bytes": memory["peak"], "loss": contestant.loss(examples)}
    if job.profile and name == "minem":
        result["profile"] = profiled(contestant, first, job.device)
    return result


def profiled(contestant: Minem | Padded, examples: list[Example], device: str) -> str:
    """A table of one optimizer step, the dearest operations first."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as seen:
        contestant.epoch(examples, 0.0)
        synchronize()
    return seen.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=25, max_name_column_width=70)


def in_a_process(name: str, job: Job) -> dict[str, Any]:
    """What `measure` returns, or {"failed": why}; with half the tokens a micro-batch where memory does not suffice."""
    while True:
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                return pool.submit(measure, name, job).result() | {"pack_tokens": job.settings.pack_tokens}
        except Exception as error:  # a contestant that cannot run here must not end the others' run
            if name == "minem":
                raise
            if "OutOfMemory" in type(error).__name__ and job.settings.pack_tokens > 2048:
                job = replace(job, settings=replace(job.settings, pack_tokens=job.settings.pack_tokens // 2))
                continue
            return {"failed": failed(error)}


def compare(job: Job, names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Every contestant's median time and largest peak; they take turns, so that a busy machine slows them alike."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names:
            if any("failed" in result for result in found[name]):
                continue
            found[name].append(in_a_process(name, replace(job, profile=job.profile and turn == 0)))
            shown = {key: value for key, value in found[name][-1].items() if key not in ("profile", "losses")}
            print(f"{name}: {json.dumps(shown)}", file=sys.stderr, flush=True)  # a run that is cut off has lost nothing
    examples = job.examples()
    tokens, supervised = sum(map(len, examples)), sum(len(e.token_ids) for e in examples)
    work = flops(job.config, tokens, supervised)
    peak = peak_flops(torch.device(job.device))
    rows = {}
    for name, results in found.items():
        if "failed" in results[-1]:
            rows[name] = results[-1]
            continue
        seconds = statistics.median(result["seconds"] for result in results)
        rows[name] = results[0] | {
            "seconds": seconds,
            "all_seconds": [result["seconds"] for result in results],
            "peak_bytes": max(result["peak_bytes"] for result in results),
            "tokens_per_second": tokens / seconds,
            "flops_per_second": work / seconds,
            "mfu": None if peak is None else work / seconds / peak,
        }
    lengths = sorted(len(e) for e in examples)
    return {
        "rows": {"count": job.rows, "tokens": tokens, "supervised": supervised, "shortest": lengths[0]}
        | {"median": lengths[len(lengths) // 2], "longest": lengths[-1]},
        "contestants": rows,
        "apart": apart(rows),
    }


def apart(rows: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference of a step's loss, and of the loss at the end, from minem's."""
    ours = rows["minem"]
    differences = {}
    for name, row in rows.items():
        if name.startswith("transformers") and "failed" not in row:
            pairs = zip([*ours["losses"], ours["loss"]], [*row["losses"], row["loss"]], strict=True)
            differences[name] = max(abs(a - b) / b for a, b in pairs)
    return differences


def table(result: dict[str, Any], rate: float) -> rich.table.Table:
    shown = rich.table.Table(
        "contestant", "seconds", "tokens/s", "TFLOP/s", "MFU", "of products here", "peak MB", "loss", "minem is", "how"
    )
    ours = result["contestants"]["minem"]
    for name, row in result["contestants"].items():
        if "failed" in row:
            shown.add_row(name, "failed", *[""] * 7, row["failed"])
            continue
        ratio = f"{row['seconds'] / ours['seconds']:.2f} x as fast, {ours['peak_bytes'] / row['peak_bytes']:.0%} memory"
        shown.add_row(
            name,
            f"{row['seconds']:.4g}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['flops_per_second'] / 1e12:.3g}",
            "" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['flops_per_second'] / rate:.0%}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{row['losses'][0]:.4f} to {row['losses'][-1]:.4f}, {row['loss']:.5f} at the end",
            "" if name == "minem" else ratio,
            f"{row['micro_batches']}, {row['pack_tokens']:,} tokens each",
        )
    return shown


@click.command()
@click.option(
    "--shape", "names", multiple=True, type=click.Choice(list(ALL_SHAPES)), help="By default all; on a CPU, small."
)
@click.option("--rows", type=click.IntRange(min=2), help="Examples; 576 on a GPU, 64 on the CPU.")
@click.option("--pack-tokens", type=click.IntRange(min=1), help="Of a micro-batch; 16,384 on a GPU, 8,192 on the CPU.")
@click.option("--repeats", type=click.IntRange(min=1), help="Epochs of each, from the same start; 1 on a GPU, else 3.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="Run the others beside, where they are.")
@click.option("--checkpointing", type=click.Choice(["auto", "off", "full"]), default="auto", show_default=True)
@click.option("--profile", is_flag=True, help="Also print where the time of one of minem's steps goes.")
@click.option("--json", "as_json", is_flag=True, help="After the tables, one JSON object on one line.")
def main(
    names: tuple[str, ...],
    rows: int | None,
    pack_tokens: int | None,
    repeats: int | None,
    peers: bool,
    checkpointing: str,
    profile: bool,
    as_json: bool,
) -> None:
    """Time one epoch of an M-step beside those of others."""
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    settings = MStepSection(
        lr=1e-5 if gpu else 1e-4,
        batch_size=72 if gpu else 16,  # on a GPU two full micro-batches, on the CPU one
        pack_tokens=pack_tokens or (16_384 if gpu else 8192),
        checkpointing=checkpointing,  # type: ignore[arg-type]
    )
    console = Console(highlight=False, width=230, stderr=as_json)
    rate = ceilings(device, dtype)[1]
    precision = str(dtype).removeprefix("torch.")
    about = {"dtype": precision, **facts("transformers", "trl", "liger-kernel", "triton", device=device)}
    for name, fact in about.items():
        console.print(f"{name}: {fact}")
    console.print(f"matrix products measured here: {rate / 1e12:,.2f} TFLOP/s")
    contestants = [name for name, (_, needed) in CONTESTANTS.items() if all(map(find_spec, needed))]
    contestants = [name for name in contestants if gpu or "Liger" not in name]  # its kernels need a GPU
    results, agree = {}, True
    for name in names or ([shape.name for shape in SHAPES] if gpu else ["small"]):
        with tempfile.TemporaryDirectory() as folder:
            write_model(ALL_SHAPES[name], Path(folder), device, dtype)
            if gpu:
                torch.cuda.empty_cache()
            job = Job(folder, device, rows or (576 if gpu else 64), settings, profile)
            result = compare(job, contestants if peers else contestants[:1], repeats or (1 if gpu else 3))
        said = result["rows"]
        console.print(
            f"\n{name}: {said['count']} rows of {said['shortest']} to {said['longest']} tokens, median "
            f"{said['median']}; {said['tokens']:,} tokens in all, {said['supervised']:,} of them supervised"
        )
        console.print(table(result, rate))
        for peer, difference in result["apart"].items():
            agree &= difference <= AGREE[precision]
            console.print(f"losses of {peer}: within {difference:.1e} of minem's (allowed: {AGREE[precision]:.0e})")
        if listing := result["contestants"]["minem"].pop("profile", None):
            console.print(f"\nOne step of minem:\n{listing}")
        results[name] = result
    if as_json:
        print(json.dumps({**about, "operations_per_s": rate, "settings": vars(settings), "shapes": results}))
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
