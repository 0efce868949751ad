"""Peak memory of `linear_cross_entropy`, forward and backward, on the CPU: it must not grow with the rows.

    python bench/memory.py            # about a minute on two cores; --json for one line
    python bench/memory.py --table    # instead: models of 0.5B to 8B on GPUs, by the arithmetic of a dry run

Each size runs in its own process. The peak is Linux's VmHWM above what the process held with its inputs, less the
gradients. The [N, V] logits alone would be 5 GB at N=8192; the bounds are 1 GB, and 10 % more than at N=2048. Exits
with 1 if either is exceeded.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from record import facts

from minem.model.decoder import Model
from minem.model.hf_config import ModelConfig
from minem.model.lora import LoRA
from minem.model.sizes import SAFE_SHARE, parameters
from minem.planning.memory import Work, e_step, fitted, m_step

# Qwen's and Llama's: layers, width, query heads, key heads, channels of a head, MLP's width, vocabulary, tied head.
MODELS = {
    "Qwen2.5-0.5B": ("qwen2", 24, 896, 14, 2, 64, 4864, 151_936, True),
    "Qwen3-0.6B": ("qwen3", 28, 1024, 16, 8, 128, 3072, 151_936, True),
    "Llama-3.2-1B": ("llama", 16, 2048, 32, 8, 64, 8192, 128_256, True),
    "Qwen2.5-1.5B": ("qwen2", 28, 1536, 12, 2, 128, 8960, 151_936, True),
    "Qwen3-1.7B": ("qwen3", 28, 2048, 16, 8, 128, 6144, 151_936, True),
    "Qwen2.5-3B": ("qwen2", 36, 2048, 16, 2, 128, 11_008, 151_936, True),
    "Llama-3.2-3B": ("llama", 28, 3072, 24, 8, 128, 8192, 128_256, True),
    "Qwen3-4B": ("qwen3", 36, 2560, 32, 8, 128, 9728, 151_936, True),
    "Qwen2.5-7B": ("qwen2", 28, 3584, 28, 4, 128, 18_944, 152_064, False),
    "Llama-3.1-8B": ("llama", 32, 4096, 32, 8, 128, 14_336, 128_256, False),
    "Qwen3-8B": ("qwen3", 36, 4096, 32, 8, 128, 12_288, 151_936, False),
}
GPUS = ((1, 24), (1, 80), (1, 141), (8, 80))  # how many, GB of each; several train with FSDP
CONTEXT = 1e9  # bytes for CUDA itself and its libraries
PROMPT, NEW, SLOTS, RANK = 256, 1024, 256, 16

WIDTH, VOCABULARY, CHUNK_ROWS = 256, 151_936, 512


def resident(field: str) -> int:
    """Bytes that this process holds now (VmRSS) or held at most (VmHWM)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def peak(rows: int) -> int:
    """Bytes held at most above inputs and gradients, for `rows` rows; call it in a fresh process."""
    from minem.kernels import linear_cross_entropy

    generator = torch.Generator().manual_seed(0)
    small = torch.ones(64, 64, requires_grad=True)
    linear_cross_entropy(small, small, torch.zeros(64, dtype=torch.int64))[0].backward()  # loads what loads lazily
    hidden = torch.randn(rows, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).requires_grad_()
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    before = resident("VmRSS")
    loss, _, _ = linear_cross_entropy(hidden, weight, targets, chunk_rows=CHUNK_ROWS)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return resident("VmHWM") - before - (hidden.numel() + weight.numel()) * 4


def model_config(name: str) -> ModelConfig:
    """The shape of one of MODELS."""
    kind, layers, width, heads, keys, channels, inner, vocabulary, tied = MODELS[name]
    return ModelConfig(
        model_type=kind,
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=channels,
        tie_word_embeddings=tied,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )


def cell(config: ModelConfig, gpus: int, gigabytes: int, pack: int, adapters: int) -> str:
    """Slots, recomputed blocks and the peak of both steps on GPUs of this size; "no" if it does not fit."""
    free = int(gigabytes * 1e9 - CONTEXT)
    dtype, supervised = torch.bfloat16, pack * NEW // (PROMPT + NEW)
    for slots in (SLOTS >> n for n in range(5)):  # below 16, an E-step of thousands of draws takes too long
        asked = Work(
            slots, PROMPT, NEW, pack, supervised, micro_batches=2, adapters=adapters, ranks=gpus, split=gpus > 1
        )
        work = fitted(config, dtype, "cuda", asked, free, "auto")
        drawing = sum(e_step(config, dtype, "cuda", work).values())
        if drawing <= free:
            break
    parts = m_step(config, dtype, "cuda", work)
    training = sum(parts.values())
    if training > SAFE_SHARE * free:
        training -= parts["KV cache"]
    if drawing > free or training > SAFE_SHARE * free:
        return f"no: {drawing / 1e9:.0f}, {training / 1e9:.0f}"
    return f"{work.slots}, {work.checkpointed}/{config.num_hidden_layers}: {drawing / 1e9:.0f}, {training / 1e9:.0f}"


def table() -> Iterator[str]:
    """The table of models and GPUs, as lines of Markdown."""
    yield f"""\
`python bench/memory.py --table`, commit {facts()["commit"]}: planned by the arithmetic of `minem train --dry-run`, not
measured. Working weights in bf16; float32 masters and AdamW for what is trained; prompts of {PROMPT} tokens and up to
{NEW:,} new ones; {CONTEXT / 1e9:g} GB left to CUDA itself, and of the rest {SAFE_SHARE:.0%} to the M-step.

Cells: slots, blocks whose activations are recomputed / all blocks: GB at the peak of the E-step, of the M-step (with
the cache where there is room for both). "no" where one of the two does not fit, and what they would take. Several GPUs
train with FSDP, and the bytes are those of each.
"""
    sizes = " | ".join(f"{gpus} x {size} GB" if gpus > 1 else f"{size} GB" for gpus, size in GPUS)
    yield f"| model | parameters | trained | pack | {sizes} |"
    yield "|---" * (4 + len(GPUS)) + "|"
    for name in MODELS:
        config = model_config(name)
        for trained, rank in (("all", 0), (f"LoRA {RANK}", RANK)):
            with torch.device("meta"):
                terms = LoRA(Model(config), rank, 1.0, "all", 0, Path()).named_parameters() if rank else {}
            adapters = sum(p.numel() for p in terms.values())
            for pack in (8192, 16_384):
                cells = " | ".join(cell(config, gpus, size, pack, adapters) for gpus, size in GPUS)
                count = parameters(config).total
                yield f"| {name} | {count / 1e9:.2f} B | {trained} | {pack:,} | {cells} |"


@click.command()
@click.option("--table", "as_table", is_flag=True, help="Plan models of 0.5B to 8B on GPUs; nothing is measured.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on one line.")
def main(as_table: bool, as_json: bool) -> None:
    """Measure the peak at 2,048 and at 8,192 rows and compare it with the bounds."""
    if as_table:
        click.echo("\n".join(table()))
        return
    peaks = {}
    for rows in (2048, 8192):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[rows] = pool.apply(peak, (rows,))
    ratio = peaks[8192] / peaks[2048]
    holds = peaks[8192] < 1e9 and ratio < 1.1
    if as_json:
        shape = {"width": WIDTH, "vocabulary": VOCABULARY, "chunk_rows": CHUNK_ROWS}
        click.echo(json.dumps({**facts(), **shape, "peak_bytes": peaks, "holds": holds}))
    else:
        for rows, size in peaks.items():
            click.echo(f"N={rows}: {size / 1e6:.0f} MB above inputs and gradients")
        click.echo(f"bounds {'hold' if holds else 'MISSED'}: under 1000 MB, and N=8192 over N=2048 {ratio:.3f} < 1.1")
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
