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
HEAVY = {"torch", "triton", "transformers", "pyarrow", "matplotlib"}


def python(code: str, *, path: Path, cwd: Path | None = None) -> str:
    """Standard output of `code` in a fresh interpreter that finds minem in the folder `path` and nowhere else."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_minem_its_config_and_its_help_load_nothing_heavy():
    code = f"""
import sys
import minem, minem.config
from click.testing import CliRunner
from minem.cli import main
for arguments in (["--help"], ["config"]):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert ("train" if arguments == ["--help"] else "pack_tokens") in result.output
print(sorted({HEAVY} & set(sys.modules)))
"""
    assert python(code, path=ROOT).splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", LINKS)
def test_the_links_point_to_the_top_level_folders(name):
    assert os.readlink(ROOT / "minem" / name) == f"../{name}"
    assert (ROOT / "minem" / name / "__init__.py").samefile(ROOT / name / "__init__.py")


def test_the_source_tree_works_by_pythonpath_alone(tmp_path):
    code = "import minem.kernels.sampling, minem.data.tasks as t; print(minem.__file__, len(t.load_task('toy').test))"
    file, questions = python(code, path=ROOT, cwd=tmp_path).split()
    assert Path(file) == ROOT / "minem" / "__init__.py"
    assert int(questions) > 0


def test_lint_refuses_the_bare_names():
    def lint(code: str) -> str:
        command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "minem/new.py", "--output-format=concise"]
        return subprocess.run([*command, "-"], input=code, cwd=ROOT, capture_output=True, text=True).stdout

    uses = "".join(f"print({name})\n" for name in sorted(LINKS))
    bare = "".join(f"import {name}\n" for name in sorted(LINKS))
    members = "".join(f"from {name} import {name[0]}\n" for name in sorted(LINKS))
    assert lint(f'"""New."""\n\n{bare}{members}\n{uses}').count("TID251") == 2 * len(LINKS)
    assert "All checks passed" in lint(f'"""New."""\n\nfrom minem import {", ".join(sorted(LINKS))}\n\n{uses}')


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
    """That all files of all rooms are packed, and run if no source tree is near: no quick test builds a wheel.

    Built from a copy, so that no `build/` of another day gets into it.
    """
    source, wheels, site = tmp_path / "source", tmp_path / "wheels", tmp_path / "site"
    clutter = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    results = {"runs", "evals"}  # at the top alone: minem/runs is a room
    shutil.copytree(
        ROOT,
        source,
        symlinks=True,
        ignore=lambda at, names: clutter(at, names) | (results if at == str(ROOT) else set()),
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-q", "-w", wheels, source], check=True)
    (wheel,) = wheels.iterdir()
    packed = set(zipfile.ZipFile(wheel).namelist())
    expected = {"minem/py.typed", "minem/data/toy/model/model.safetensors", "minem/data/toy/model/tokenizer.json"}
    for top, patterns in {
        "minem": ["*.py", "report/page.*"],
        "kernels": ["*.py"],
        "data": ["*.py", "*.jsonl", "wordings.toml"],
        "configs": ["*.toml"],
    }.items():
        for pattern in patterns:
            found = {path.relative_to(ROOT).as_posix() for path in (ROOT / top).rglob(pattern)}
            assert found, f"{top}/{pattern}"
            expected |= found if top == "minem" else {f"minem/{name}" for name in found}
    assert {"minem/em/loop.py", "minem/runs/stages.py", "minem/report/page.css"} <= expected
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
    """That the command of bench/README.md ends with all its rows: no quick test runs a benchmark."""
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
CEILINGS = {"all lines": 12_804, "reading path": 2_961, "em.loop": 117, "largest file": 387, "largest function": 52}


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
