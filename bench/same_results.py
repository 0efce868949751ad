"""Does a refactor change a result? The same runs in two source trees, compared byte for byte.

    git worktree add ../before HEAD~1
    python bench/same_results.py ../before . --out /tmp/same

Each run is made in both trees (a run that is there already is not repeated). Compared are the fields of samples.jsonl
and accepted.jsonl, the evaluations, and the final weights; exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

SMALL = ["--iterations", "2", "--limit", "128"]
RUNS = {
    "rsm": ["--sampler", "rsm", "--budget", "8"],
    "star": ["--sampler", "star"],
    "pps": ["--sampler", "pps"],
    "lora": ["--sampler", "rsm", "--budget", "4", *SMALL, "--set", "mstep.lora_rank=8", "--set", "mstep.lr=2e-3"],
    "bf16": [
        *["--sampler", "star", "--budget", "3", *SMALL, "--set", "model.dtype=bfloat16"],
        *["--set", "sampler.draws=all", "--set", "mstep.weights=importance"],
    ],
    "blocks": [
        *["--sampler", "rsm", "--budget", "4", "--iterations", "3", "--limit", "128"],
        *["--set", "run.questions_per_iteration=64", "--set", "run.slots=4"],
        *["--set", "sampler.proposal=base", "--set", "mstep.optimizer_state=keep"],
    ],
}
FIELDS = {
    "samples.jsonl": "id iteration attempt prompt token_ids logprob_q logprob_plain text answer gold status leak",
    "accepted.jsonl": "id iteration attempt prompt token_ids logprob_q logprob_plain text answer gold status leak",
    "eval.validation.jsonl": "id answer gold status text tokens",
    "eval.test.jsonl": "id answer gold status text tokens",
}


def make(tree: Path, name: str, out: Path) -> Path:
    """The run `name` as this source tree makes it."""
    run = out / name
    if not (run / "report.html").exists():
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "minem", "train", *RUNS[name], "--out", str(run)]
        environment = {**os.environ, "PYTHONPATH": str(tree.resolve())}
        subprocess.run(command, cwd=out, env=environment, check=True, stdout=subprocess.DEVNULL)
    return run


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of the fields of each file of rows, and of the weights, by their place in the run."""
    found = {}
    for path in sorted(run.glob("iter-*/*.jsonl")):
        fields = FIELDS[path.name].split()
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        content = "\n".join(json.dumps([row[field] for field in fields]) for row in rows).encode()
        found[path.relative_to(run).as_posix()] = f"{len(rows)} rows, {hashlib.sha256(content).hexdigest()[:16]}"
    for path in sorted(run.glob("iter-*/*/*.safetensors")):
        with path.open("rb") as file:
            found[path.relative_to(run).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs=2, type=Path, metavar="TREE")
    parser.add_argument("--runs", default=",".join(RUNS), help="with commas")
    parser.add_argument("--out", type=lambda name: Path(name).resolve(), default="same-results")
    arguments = parser.parse_args()
    different = 0
    for name in arguments.runs.split(","):
        before, after = (
            digests(make(tree, name, arguments.out / side))
            for side, tree in zip(("before", "after"), arguments.trees, strict=True)
        )
        odd = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        different += len(odd)
        print(f"{name}: {len(before) - len(odd)} of {len(before)} files are the same", *odd, sep="\n    ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
