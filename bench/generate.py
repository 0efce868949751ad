"""minem's generator beside transformers' `generate`, in one run, on the E-step's kind of work: a few draws for each of
many prompts of uneven length.

    python bench/generate.py                      # on the CPU, some two minutes on two cores
    python bench/generate.py --json               # the same as one line of JSON, the last

Both draw at temperature 1 from the whole vocabulary with the same weights and prompts. The model is random and has no
EOS, so each draw is exactly `--new` tokens. transformers gets what is simplest and best for it: one batch, padded on
the left, with an attention mask and num_return_sequences. Runs alternate; the first of each is a warm-up and not
counted; the table shows medians. minem also returns each token's log-probability, which transformers is not asked for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich.table
import tokenizers
import torch
import transformers
from record import facts
from rich.console import Console

import minem

transformers.logging.disable_progress_bar()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        theirs = write_model(Path(folder), options)
        model, tokenizer = minem.load(folder)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(*options.lengths, options.prompts).long().tolist()
    prompts = [torch.randint(options.vocabulary, (n,), generator=generator).tolist() for n in lengths]
    params = minem.SamplingParams(n=options.draws, max_new_tokens=options.new)

    def run_minem() -> int:
        # A new one each time: prompts that are still cached from the last run would be a head start.
        draws = minem.Generator(model, tokenizer, slots=options.slots).generate(prompts, params)
        return sum(len(completion.token_ids) for group in draws for completion in group)

    contestants = {"minem": run_minem, "transformers": lambda: run_transformers(theirs, prompts, options)}
    seconds = measure(contestants, options)
    report(seconds, describe(options, model), options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--lengths", type=int, nargs=2, default=(40, 200), help="the shortest and the longest prompt")
    parser.add_argument("--draws", type=int, default=4, help="for each prompt")
    parser.add_argument("--new", type=int, default=48, help="tokens of each draw")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--slots", type=int, default=None, help="minem's; its own default where not given")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="one line of JSON after the table")
    return parser.parse_args()


def write_model(folder: Path, options: argparse.Namespace) -> Any:
    """A random Llama and a tokenizer in `folder`; returns transformers' model of it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 32,
        num_key_value_heads=options.width // 64,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(options.vocabulary)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return model


def run_transformers(model: Any, prompts: list[list[int]], options: argparse.Namespace) -> int:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,  # off; the default is 50
        top_p=1.0,
        num_return_sequences=options.draws,
        max_new_tokens=options.new,
        pad_token_id=0,
    )
    return out.shape[0] * (out.shape[1] - longest)


def measure(contestants: dict[str, Callable[[], int]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each counted run. The contestants take turns, so that a busy machine slows them alike."""
    expected = options.prompts * options.draws * options.new
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(options.repeats + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            tokens = run()
            elapsed = time.perf_counter() - start
            if tokens != expected:
                raise RuntimeError(f"{name} drew {tokens} tokens instead of {expected}")
            if turn:
                seconds[name].append(elapsed)
    return seconds


def describe(options: argparse.Namespace, model: Any) -> dict[str, str]:
    return {
        "work": f"{options.prompts} prompts of {options.lengths[0]}-{options.lengths[1]} tokens, "
        f"{options.draws} draws each, {options.new} new tokens",
        "model": f"Llama, {options.layers} layers, width {options.width}, vocabulary {options.vocabulary}, float32, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters",
        **facts("transformers"),
    }


def report(seconds: dict[str, list[float]], about: dict[str, str], options: argparse.Namespace) -> None:
    tokens = options.prompts * options.draws * options.new
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    console = Console(highlight=False, soft_wrap=True)
    for name, fact in about.items():
        console.print(f"{name}: {fact}")
    table = rich.table.Table("", "median s", "fastest s", "slowest s", "tokens/s", "times transformers")
    for name, times in seconds.items():
        ratio = medians["transformers"] / medians[name]
        numbers = (medians[name], min(times), max(times))
        table.add_row(name, *(f"{x:.2f}" for x in numbers), f"{tokens / medians[name]:,.0f}", f"{ratio:.2f}")
    console.print(table)
    if options.json:
        ratio = medians["transformers"] / medians["minem"]
        print(json.dumps({**about, "tokens": tokens, "seconds": seconds, "ratio": ratio}))


if __name__ == "__main__":
    main()
