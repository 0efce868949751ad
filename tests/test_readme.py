"""What the README shows, done: its Python runs, its sampler works from a user's folder, all links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from minem.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SAMPLER, PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TOPS = ("minem", "kernels", "data", "configs", "tests", "bench")
DOORS = [ROOT / "README.md", *(path for top in TOPS for path in (ROOT / top).rglob("*.md") if path.resolve() == path)]


def test_the_readme_is_short_and_each_top_level_folder_has_one():
    assert len(README.splitlines()) < 150
    assert {ROOT / top / "README.md" for top in TOPS} <= set(DOORS)


@pytest.mark.parametrize("door", DOORS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(door):
    for link in re.findall(r"\]\(([^)#\s]+)\)", door.read_text()):
        assert link.startswith("https://") or (door.parent / link).exists(), link


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("(") >= 4
    assert (tmp_path / "copy" / "model.safetensors").exists()


def test_the_fourth_sampler_runs_from_its_own_folder(tmp_path, monkeypatch):
    """As the console script starts it: unlike `python -m`, that does not look for modules in the current folder."""
    assert len([line for line in SAMPLER.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *(path for path in sys.path if path not in ("", "."))])
    (tmp_path / "my_samplers.py").write_text(SAMPLER)
    arguments = ["sample", "--sampler", "my_samplers:HalfAndHalf", "--budget", "4", "--limit", "8"]
    done = CliRunner().invoke(main, arguments)
    monkeypatch.delitem(sys.modules, "my_samplers")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "runs" / "toy.HalfAndHalf4.toy-llama.s0" / "iter-01" / "samples.jsonl").exists()
