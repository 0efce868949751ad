"""The house: one import name by symbolic links, light imports, what the wheel holds, and how files open."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import house
import pytest

ROOT = Path(__file__).resolve().parents[1]

LINKS = ("kernels", "data", "configs")
# A child that runs `body` and then names the heavy packages that came with it.
HEAVY = """
import sys
{body}
print(sorted({{"torch", "triton", "transformers", "pyarrow", "matplotlib"}} & set(sys.modules)))
"""


def python(code: str, *, path: Path, cwd: Path | None = None) -> str:
    """Standard output of `code` in a fresh interpreter that finds minem in the folder `path` and nowhere else."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "body",
    [
        "import minem",
        "from click.testing import CliRunner\nfrom minem.cli import main\n"
        "result = CliRunner().invoke(main, ['--help'])\nassert result.exit_code == 0, result.output\n"
        "assert 'train' in result.output",
    ],
    ids=["import", "help"],
)
def test_importing_minem_and_its_help_load_nothing_heavy(body):
    assert python(HEAVY.format(body=body), path=ROOT).splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", LINKS)
def test_the_links_point_to_the_top_level_folders(name):
    assert os.readlink(ROOT / "minem" / name) == f"../{name}"
    assert (ROOT / "minem" / name / "__init__.py").samefile(ROOT / name / "__init__.py")


def test_the_source_tree_works_by_pythonpath_alone(tmp_path):
    code = "import minem.kernels.sampling, minem.data.tasks as t; print(minem.__file__, len(t.load_task('toy').test))"
    file, questions = python(code, path=ROOT, cwd=tmp_path).split()
    assert Path(file) == ROOT / "minem" / "__init__.py"
    assert int(questions) > 0


@pytest.mark.parametrize("name", LINKS)
def test_lint_refuses_the_bare_names(name):
    def lint(code: str) -> str:
        command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "minem/new.py", "--output-format=concise"]
        return subprocess.run([*command, "-"], input=code, cwd=ROOT, capture_output=True, text=True).stdout

    refused = f'"""New."""\n\nimport {name}\n\nprint({name})\n'
    assert "TID251" in lint(refused)
    assert "TID251" in lint(f'"""New."""\n\nfrom {name} import x\n\nprint(x)\n')
    assert "All checks passed" in lint(refused.replace(f"import {name}", f"from minem import {name}"))


def test_every_file_opens_with_what_it_is():
    tops = ("minem", *LINKS, "tests", "bench")
    files = [path for top in tops for path in (ROOT / top).rglob("*.py") if path.resolve() == path]
    assert len(files) > 40
    silent = [str(path.relative_to(ROOT)) for path in files if path.read_text().strip() and not docstring(path)]
    assert silent == []


def docstring(path: Path) -> str | None:
    return ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.slow
def test_the_wheel_holds_everything_and_works(tmp_path):
    """Built from a copy, so that no `build/` of another day gets into it; installed where no source tree is near."""
    source, wheels, site = tmp_path / "source", tmp_path / "wheels", tmp_path / "site"
    skipped = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skipped)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-q", "-w", wheels, source], check=True)
    (wheel,) = wheels.iterdir()
    packed = set(zipfile.ZipFile(wheel).namelist())
    expected = {"minem/py.typed", "minem/data/toy/model/model.safetensors", "minem/data/toy/model/tokenizer.json"}
    for top, patterns in {
        "minem": ["*.py", "page.*"],
        "kernels": ["*.py"],
        "data": ["*.py", "toy/*.jsonl"],
        "configs": ["*.toml"],
    }.items():
        for pattern in patterns:
            found = {path.relative_to(ROOT).as_posix() for path in (ROOT / top).glob(pattern)}
            assert found, f"{top}/{pattern}"
            expected |= found if top == "minem" else {f"minem/{name}" for name in found}
    assert expected - packed == set()
    assert not [name for name in packed if not name.startswith(("minem/", "minem-"))]

    subprocess.run([*pip, "install", "--no-deps", "-q", "--target", site, wheel], check=True)
    code = (
        "import minem, minem.kernels.sampling, minem.data.tasks as t\n"
        "model, tokenizer = minem.load(t.TOY / 'model')\n"
        "print(minem.__file__, len(t.load_task('toy').test), model.config.vocab_size)"
    )
    file, questions, vocabulary = python(code, path=site, cwd=tmp_path).split()
    assert Path(file) == site / "minem" / "__init__.py"
    assert int(questions) > 0
    assert int(vocabulary) > 0


@pytest.mark.slow
def test_the_benchmark_of_the_generator_runs():
    command = [sys.executable, "bench/generate.py", *["--questions", "8", "--repeats", "1", "--json"]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = {row["work"]: row for row in json.loads(done.stdout.splitlines()[-1])["shapes"]["small"]}
    assert {"decode B=1", "24 prompts x 4 draws x 48", "E-step on these, budget 8"} <= rows.keys()
    for row in rows.values():
        assert not [seconds for seconds in row["seconds"].values() if isinstance(seconds, str)]  # a reason to fail
        assert row.get("floor_s", 1) > 0
    assert {"minem", "transformers"} <= rows["24 prompts x 4 draws x 48"]["seconds"].keys()


# Figures of `python bench/house.py`. They may only fall: lower them when the code gets smaller.
CEILINGS = {"all lines": 11_500, "reading path": 3_100, "em.loop": 120, "largest file": 400, "largest function": 60}


def test_a_room_imports_rooms_below_it_and_no_files_are_in_a_circle():
    assert house.upward() == []
    assert house.circle() == []
    assert {name.split(".")[0] for name in house.sources()} <= {*house.FLOOR, "__init__", "configs"}  # each has a floor


def test_the_house_does_not_grow():
    found = house.figures()
    assert {name: size for name, size in found.items() if size > CEILINGS[name]} == {}


def test_the_kernels_know_nothing_of_the_rest_and_the_m_step_nothing_of_the_e_step():
    for name, path in house.sources().items():
        if name.startswith("kernels"):
            assert {other.split(".")[0] for other in house.imports(path)} <= {"kernels"}, name
    assert not house.imports(ROOT / "minem/em/mstep.py") & {"em.samplers", "em.estep", "generation.generator"}
