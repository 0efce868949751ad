"""Wrong command lines, configs and files: exit code 2, one sentence that names what is wrong, and nothing on the disk.

    python -m pytest tests/test_wrong_commands.py

Each line of the table is a command, run where only the files of `FILES` are, and what its sentence must hold: the flag,
key, file or row, and the nearest valid name where there is one.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import minem
from minem.cli import main
from minem.data.tasks import TOY
from minem.errors import UserError
from tests.mutations import assert_harmless

ROW = {"id": "q1", "question": "What?", "choices": {"text": ["light", "soup"], "label": ["A", "B"]}, "answerKey": "A"}
ROWS = "".join(json.dumps({**ROW, "id": f"q{i}"}) + "\n" for i in range(10))
FILES = {
    "empty.toml": "",
    "section.toml": "[sampelr]\nname = 'rsm'\n",
    "key.toml": "[sampler]\nbugdet = 8\n",
    "elsewhere.toml": "[run]\nlr = 1e-5\n",
    "value.toml": "[mstep]\nlr = 'fast'\n",
    "range.toml": "[sampler]\ntop_p = 1.5\n",
    "choice.toml": "[run]\ninit = 'previuos'\n",
    "code.toml": "[task]\nverdict = 'shutil:rmtree'\n",
    "own.toml": "[task]\nverdict = 'minem.files:write_rows'\n",
    "package.toml": "[sampler]\nname = 'hypothesis:given'\n",
    "hidden.toml": "[task]\nverdict = 'shutil:rmtree'\n[sampler]\nname = 'shutil:rmtree'\n",
    "shutil.py": "def rmtree(text, question): pass\n",
    "broken.toml": "[run\nseed = 1\n",
    "bytes.toml": b"\xff\xfe",
    "large.toml": "#" * 70_000,
    "rows.jsonl": ROWS,
    "bad-row.jsonl": ROWS + '{"id": "q11", "question": "What?"}\n',
    "cut-row.jsonl": ROWS + '{"id": "q11", "ques\n',
    "twice.jsonl": ROWS + ROWS,
    "key-twice.jsonl": ROWS.replace('"id": "q3"', '"id": "q3", "id": "x"'),
    "nan.jsonl": ROWS.replace('"answerKey": "A"', '"answerKey": NaN', 1),
    "one.jsonl": json.dumps(ROW) + "\n",
    "none.jsonl": "",
    "rows.csv": "question,answer\n",
    "rows.parquet": b"PAR1 no more",
    "prompts.jsonl": '{"prompt": "a"}\n{"prompt": 7}\n',
    "samples-id.jsonl": '{"id": "nobody", "token_ids": [1]}\n',
    "samples-ids.jsonl": '{"id": "toy-train-001", "token_ids": ["1"]}\n',
    "samples-text.jsonl": '{"id": "toy-train-001", "token_ids": [5, 6], "text": "other"}\n',
    "samples-json.jsonl": "no\n",
    "folder/train.jsonl": ROWS,
    "folder/validation.jsonl": ROWS,
    "other/notes.txt": "mine",
    "no-model/config.json": "{}",
    "run/run.json": "[]",
    "plan/plan.json": "{}",
}

DEEP = "a/" * 2_000  # making so many folders went beyond Python's recursion limit
# command -> what its one sentence must hold
WRONG = {
    # commands and flags
    "trian": "there is no command 'trian'; did you mean 'train'?",
    "frobnicate": "there is no command 'frobnicate'; the commands are ",
    "--verison": "--verison",
    "doctor --jsn": "there is no flag --jsn; did you mean --json?",
    "train --gpus 0": "Invalid value for '--gpus'",
    "train --gpus 4000": "--gpus 4000, but torch sees",
    "train --dry-rn": "there is no flag --dry-rn; did you mean --dry-run?",
    "train --dry-run --task tyo": "did you mean 'toy'?",
    "train --sampelr rsm": "there is no flag --sampelr; did you mean --sampler?",
    "train --bugdet 8": "there is no flag --bugdet; did you mean --budget?",
    "eval --modle toy": "there is no flag --modle; did you mean --model?",
    "generate --promt hi": "there is no flag --promt; did you mean --prompt?",
    "sample --iterration 2": "there is no flag --iterration; did you mean --iteration?",
    "compare --sampler rsm": "there is no flag --sampler; did you mean --samplers?",
    "show run --statsu wrong": "there is no flag --statsu; did you mean --status?",
    "report run --ouy page.html": "there is no flag --ouy; did you mean --out?",
    "train --budget": "Option '--budget' requires an argument",
    "train --json=yes": "Option '--json' does not take a value",
    "train empty.toml more.toml": "Got unexpected extra argument (more.toml)",
    "show": "Missing argument 'RUN'",
    "report": "Missing argument 'RUN...'",
    # values of flags
    "train --budget many": "Invalid value for '--budget': 'many' is not a valid integer",
    "train --budget 0": "--budget: sampler.budget is 0; it must be greater than or equal to 1",
    "train --budget -1": "--budget: sampler.budget is -1; it must be greater than or equal to 1",
    "train --sampler rms": "(did you mean rsm?)",
    "train --sampler nowhere:Sampler": "cannot be imported (ModuleNotFoundError(\"No module named 'nowhere'\"))",
    "train --sampler json:Sampler": "module 'json' has no attribute 'Sampler'",
    "train --sampler json:loads": "sampler.name 'json:loads' cannot be built",
    "train --iterations -1": "--iterations: run.iterations is -1; it must be greater than or equal to 0",
    "train --seed -1": "--seed: run.seed is -1; it must be greater than or equal to 0",
    "train --seed 1.5": "Invalid value for '--seed'",
    "train --device gpu": '--device: run.device is "gpu"; it must be one of auto, cpu, cuda',
    "train --limit 0": "--limit: task.limit is 0; it must be greater than or equal to 1",
    "train --verdict mine": '--verdict: task.verdict is "mine"; it must be written as module:function',
    "train --verdict json:nothing": "module 'json' has no attribute 'nothing'",
    "train --track tensorboard": "'tensorboard' is not one of",
    "train --track trackoi": "did you mean trackio?",
    "eval --split vald": "'vald' is not one of 'train', 'validation', 'test'",
    "eval --split tset": "did you mean test?",
    "eval --shots always": "the prompt set has no shots",
    "eval --prompt defualt": "did you mean default?",
    "eval --samples -1": "Invalid value for '--samples'",
    "eval --max-new-tokens 0": "Invalid value for '--max-new-tokens'",
    "eval --max-new-tokens 100000": "lower --max-new-tokens",
    "eval --limit 0": "Invalid value for '--limit': 0",
    "eval --device gpu": "'gpu' is not one of 'auto', 'cpu', 'cuda'",
    "eval --verdict json:nothing": "module 'json' has no attribute 'nothing'",
    "generate": "give either --prompt TEXT or --prompts FILE.jsonl",
    "generate --prompt a --prompts prompts.jsonl": "give either --prompt TEXT or --prompts FILE.jsonl",
    "generate --prompt a --n 0": "--n = 0 must be at least 1",
    "generate --prompt a --n 1000000000000": "must be at least 1 and at most 1000000",
    "generate --prompt a --temperature -1": "--temperature = -1.0 must be",
    "generate --prompt a --temperature nan": "--temperature = nan must be",
    "generate --prompt a --top-p 2": "--top-p = 2.0 must be",
    "generate --prompt a --top-k -3": "--top-k = -3 must be",
    "generate --prompt a --min-p 7": "--min-p = 7.0 must be",
    "generate --prompt a --max-new-tokens 0": "--max-new-tokens = 0 must be at least 1",
    "generate --prompt a --stop ''": "--stop = ('',) must be texts",
    "generate --prompts nowhere.jsonl": "nowhere.jsonl cannot be read: No such file",
    "generate --prompts prompts.jsonl": 'prompts.jsonl, row 2: "prompt" must be a text',
    "generate --prompts none.jsonl": "none.jsonl has no rows",
    "sample --iteration 0": "Invalid value for '--iteration'",
    "sample --iteration 2 --overwrite": "--overwrite would remove the model that --iteration 2 needs",
    "compare --samplers rsm:8,rsm:8": "--samplers",
    "compare --samplers rms:8": "(did you mean rsm?)",
    "compare --samplers rsm:many": "the budget of rsm must be a whole number",
    "compare --samplers rsm:8,": "--samplers 'rsm:8,': give one or more different values with commas",
    "compare --seeds 0,x": "--seeds '0,x': give one or more different values",
    "compare --seeds 0,1,01": "--seeds '0,1,01': give one or more different values",
    "compare --models toy,toy": "--models 'toy,toy': give one or more different values",
    "compare --models nowhere,toy": "model 'nowhere' is no folder that exists, and no hub id",
    "compare --models toy --model toy": "give either --model or --models",
    "compare --arm control": "write it as NAME:section.key=value, like control:sampler.filter=none",
    "compare --arm control:filter=none": "--arm control:: there is no key filter; did you mean sampler.filter?",
    "compare --arm control:run.seed=1": "all rows share run.seed, so an arm cannot set it",
    "compare --arm few:sampler.budget=0": "sampler.budget is 0; it must be greater than or equal to 1",
    "compare --match kepd": "did you mean kept?",
    "compare --set sampler.budget=4": "--set sampler.budget: compare takes it from --samplers",
    "compare --set run.seed=4": "--set run.seed: compare takes it from --seeds",
    "show run --status rihgt": "'rihgt' is not one of 'accepted', 'wrong', 'unparsed', 'truncated'",
    "show run --status acepted": "did you mean accepted?",
    "show run --iteration x": "Invalid value for '--iteration': 'x'",
    "show run -n -1": "Invalid value for '-n'",
    # keys of the config
    "train --set": "Option '--set' requires an argument",
    "train --set sampler.budget": "--set sampler.budget: write it as section.key=value",
    "train --set bugdet=8": "--set: there is no key bugdet; ",
    "train --set budget=8": "--set: there is no key budget; did you mean sampler.budget?",
    "train --set sampler.bugdet=8": "--set: there is no key sampler.bugdet; did you mean sampler.budget?",
    "train --set run.lr=1": "--set: there is no key run.lr; did you mean mstep.lr?",
    "train --set mstep.lr=fast": '--set: mstep.lr is "fast"; it must be',
    "train --set mstep.lr=nan": "--set: mstep.lr is nan; it must be a finite number",
    "train --set sampler.draws=frist": "(did you mean first?)",
    "train --set mstep.weights=question": 'it needs sampler.draws = "all"',
    "train --set mstep.optimizer_state=keep --set run.init=base": "leave one of the two out",
    "train --set sampler.hint=forwards": "(did you mean forward?)",
    "train --set run.keep=newest": 'run.keep is "newest"; it must be one of last, all',
    "train --set run.slots=0": "run.slots is 0; it must be greater than or equal to 1",
    "train --set mstep.epochs=1000000000000": "it must be less than or equal to 1000",
    "train --set eval.samples=-1": "eval.samples is -1; it must be greater than or equal to 0",
    "train --set sampler.budget=2 --budget 3": "sampler.budget is given twice on the command line",
    "train --set sampler.max_new_tokens=5000": "lower sampler.max_new_tokens",
    # config files
    "train nowhere.toml": "nowhere.toml cannot be read: No such file",
    "train folder": "folder cannot be read: Is a directory",
    "config key.toml": "key.toml: there is no key sampler.bugdet; did you mean sampler.budget?",
    "train section.toml": "section.toml: there is no section [sampelr]; it must be one of",
    "train key.toml": "key.toml: there is no key sampler.bugdet; did you mean sampler.budget?",
    "train elsewhere.toml": "elsewhere.toml: there is no key run.lr; did you mean mstep.lr?",
    "train value.toml": 'value.toml: mstep.lr is "fast"; it must be',
    "train range.toml": "range.toml: sampler.top_p is 1.5; it must be less than or equal to 1",
    "train choice.toml": "(did you mean previous?)",
    "train code.toml": "if you trust it, give --verdict shutil:rmtree on the command line",
    "train own.toml": "if you trust it, give --verdict minem.files:write_rows on the command line",
    "train package.toml": "if you trust it, give --sampler hypothesis:given on the command line",
    "train hidden.toml": 'is "shutil:rmtree", which is no code of this folder',
    "train broken.toml": "broken.toml is not valid TOML",
    "train bytes.toml": "bytes.toml is not valid TOML",
    "train large.toml": "large.toml has more than 65536 bytes",
    # tasks and their rows
    "train --task tyo": "no task or path 'tyo' (did you mean 'toy'?)",
    "train --task arc-chalenge": "(did you mean 'arc-challenge'?)",
    "eval --task openbokqa": "(did you mean 'openbookqa'?)",
    "eval --task rows.csv": "rows.csv is neither .jsonl nor .parquet",
    "eval --task rows.parquet": "rows.parquet is not a readable parquet file",
    "eval --task folder": "folder holds neither test.jsonl nor test.parquet",
    "train --task bad-row.jsonl": "bad-row.jsonl, row 11: the field 'choices' is missing",
    "train --task cut-row.jsonl": "cut-row.jsonl, row 11: not one JSON object",
    "train --task twice.jsonl": "twice.jsonl, row 11: the field 'id' repeats 'q0' of row 1",
    "train --task key-twice.jsonl": "key-twice.jsonl, row 4: not one JSON object in UTF-8 (the key 'id' stands twice",
    "train --task nan.jsonl": "nan.jsonl, row 1: not one JSON object in UTF-8 (NaN is no JSON number)",
    "train --task one.jsonl": "the validation split of one.jsonl is empty",
    "train --task none.jsonl": "split of none.jsonl is empty",
    "compare --task toy,tyo": "no task or path 'tyo' (did you mean 'toy'?)",
    # models
    "train --model ~nobody-knows/x": "model '~nobody-knows/x' is no folder that exists, and no hub id",
    "train --model ./missing": "model './missing' is no folder that exists, and no hub id",
    "train --model README.md": "model 'README.md' is no folder that exists, and no hub id",
    "train --model nowhere": "model 'nowhere' is no folder that exists, and no hub id",
    "eval --model ''": "model is empty; give a folder, a hub id, or toy",
    "generate --prompt a --model other": "other/config.json cannot be read: No such file",
    "generate --prompt a --model no-model": "no-model/config.json: model_type None is not one of llama, qwen2, qwen3",
    # samples
    "train --samples nowhere.jsonl": "--samples nowhere.jsonl is not a file",
    "train --samples samples-id.jsonl": "samples-id.jsonl, row 1: id 'nobody' is no training question of toy",
    "train --samples samples-ids.jsonl": "samples-ids.jsonl, row 1: token_ids must be a list",
    "train --samples samples-text.jsonl": "samples-text.jsonl, row 1: token_ids do not spell its text",
    "train --samples samples-json.jsonl": "samples-json.jsonl, line 1: not a JSON object",
    # places
    "train --out other": "--out other is not empty and no run directory (it holds notes.txt)",
    "train --out rows.jsonl": "--out rows.jsonl is a file; it must be a folder",
    f"train --out {DEEP}": "it must be a text that is valid Unicode and not empty, without NUL, of at most 1,000",
    f"sample --out {DEEP}": "of at most 1,000 characters",
    f"compare --seeds 0 --out {DEEP}": "of at most 1,000 characters",
    f"eval --limit 2 --out {DEEP}": "of at most 1,000 characters",
    "compare --out other": "--out other is not empty and no comparison",
    "eval --columns gold=answer --task other": 'task.columns: "gold=answer" must be NAME=COLUMN',
    "eval --limit 2 --max-new-tokens 4 --out other": "other is not empty and no evaluation folder",
    "show nowhere": "nowhere is not a run directory: nowhere/run.json cannot be read",
    "show run": "run is not a run directory: run/run.json holds a JSON list",
    "show plan": "plan is a comparison and no run",
    "report nowhere": "nowhere is not a run directory",
    "report run other": "run is not a run directory",
    "report run -o ''": "the report . cannot be written: that is a folder",
    "report run -o /": "the report / cannot be written: that is a folder",
    "report plan": "plan is a comparison and no run",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def refused(code: int, stdout: str, stderr: str, expected: str) -> None:
    assert (code, stdout) == (2, ""), stderr
    (sentence,) = stderr.splitlines()
    assert sentence.startswith("minem: ")
    assert expected in sentence
    assert len(sentence) < 600
    assert_harmless(sentence)


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_is_one_sentence(place: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(place)
    before = contents(place)
    result = CliRunner().invoke(main, shlex.split(command))
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    refused(result.exit_code, result.stdout, result.stderr, WRONG[command])
    assert contents(place) == before


def test_the_table_knows_each_command_and_most_flags() -> None:
    words = [word for command in WRONG for word in shlex.split(command)]
    flags = {flag for command in main.commands.values() for param in command.params for flag in param.opts}
    assert set(main.commands) <= set(words)
    untried = {flag for flag in flags if flag.startswith("--")} - set(words)
    assert untried <= {"--chat", "--json", "--question"}, untried
    assert len(WRONG) >= 60


def test_the_process_itself_ends_so(place: Path) -> None:
    command = "train key.toml"
    environment = {**os.environ, "PYTHONPATH": str(Path(minem.__file__).parents[1])}
    before = contents(place)
    arguments = [sys.executable, "-m", "minem", *shlex.split(command)]
    done = subprocess.run(arguments, cwd=place, env=environment, capture_output=True, text=True)
    refused(done.returncode, done.stdout, done.stderr, WRONG[command])
    assert contents(place) == before


def test_a_link_that_leads_out_of_a_model_folder_is_refused(tmp_path: Path) -> None:
    """Or publishing what was trained would publish a file of the user's; the hub's own cache is made of good links."""
    secret = tmp_path / "secret"
    secret.write_text("{}")
    for name in ("vocab.json", "config.json", "model.safetensors", "generation_config.json", "chat_template.jinja"):
        folder = shutil.copytree(TOY / "model", tmp_path / name / "model")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        with pytest.raises(UserError, match=re.escape(f"{name} is a link that leads out of its folder")):
            minem.save(*minem.load(folder), tmp_path / "copy")
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copytree(TOY / "model", cache / "blobs")
    for path in (cache / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    (tmp_path / "link").symlink_to(snapshot)
    links = tmp_path / "local-dir"  # as `hf download --local-dir` of older versions left it
    links.mkdir()
    for path in (cache / "blobs").iterdir():
        (links / path.name).symlink_to(path)
    for folder in (snapshot, tmp_path / "link", links):
        minem.save(*minem.load(folder), tmp_path / "copy")
        assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())
