"""What the README shows, done: its Python runs, its sampler works from a user's folder, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SAMPLER, PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_python_of_the_readme_runs(tmp_path):
    done = subprocess.run([sys.executable, "-c", PYTHON], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(") >= 4
    assert (tmp_path / "copy" / "model.safetensors").exists()


def test_the_fourth_sampler_runs_from_its_own_folder(tmp_path):
    assert len([line for line in SAMPLER.splitlines() if line.strip()]) <= 15
    (tmp_path / "my_samplers.py").write_text(SAMPLER)
    # As the console script starts it: unlike `python -m`, that does not look for modules in the current folder.
    script = "import sys; sys.path[0] = '/nowhere'; from minem.cli import main; main()"
    arguments = ["sample", "--sampler", "my_samplers:HalfAndHalf", "--budget", "4", "--limit", "32"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "toy.HalfAndHalf4.toy-llama.s0" / "iter-01" / "samples.jsonl").exists()
