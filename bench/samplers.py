"""The samplers side by side on the embedded toy: what each one reaches, what it costs, and what it learns.

    python bench/samplers.py                       # about five minutes on two CPU cores
    python bench/samplers.py --json > record.json

Every line is a run of `minem train` of its own, at its sampler's default budget. `valid` is the share of the kept
rationales in which every step is true, which a program can check on the toy alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import facts

RUNS = {
    "rsm, budget 8": ["--sampler", "rsm"],
    "star, budget 2, hint forward": ["--sampler", "star"],
    "pps, budget 1, hint forward": ["--sampler", "pps"],
    "star, budget 2, hint justify": ["--sampler", "star", "--set", "sampler.hint=justify"],
    "pps, budget 1, hint justify": ["--sampler", "pps", "--set", "sampler.hint=justify"],
    "pps, forward, proposal base": ["--sampler", "pps", "--set", "sampler.proposal=base"],
    "control: no filter": ["--sampler", "rsm", "--set", "sampler.filter=none"],
}


def train(arguments: list[str], out: Path, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "minem", "train", *arguments, "--seed", str(seed), "--out", str(out), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    return {key: value for key, value in result.items() if key not in ("run", "model")}  # folders that are gone


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def print_table(results: dict[str, dict[str, Any]]) -> None:
    print("| run | test: base -> last | McNemar p | validation, iterations 1 to 4 | valid among kept | tokens drawn |")
    print("|---|---|---|---|---|---|")
    for name, result in results.items():
        test, iterations = result["test"], result["iterations"][1:]
        accuracies = " ".join(percent(row["validation"]["accuracy"]) for row in iterations)
        valid = " ".join(percent(row["estep"]["valid"]) for row in iterations)
        tokens = " ".join(f"{row['estep']['tokens'] / 1000:.1f}k" for row in iterations)
        gain = f"{percent(test['base']['accuracy'])} -> {percent(test['last']['accuracy'])}"
        print(f"| {name} | {gain} | {test['mcnemar_p']:.1g} | {accuracies} | {valid} | {tokens} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, arguments) in enumerate(RUNS.items()):
            print(f"--- {name}", file=sys.stderr)
            results[name] = train(arguments, Path(folder) / str(number), options.seed)
    if options.json:
        print(json.dumps({**facts(), "seed": options.seed, "runs": results}))
        return
    for name, fact in {**facts(), "seed": options.seed}.items():
        print(f"{name}: {fact}")
    print()
    print_table(results)


if __name__ == "__main__":
    main()
