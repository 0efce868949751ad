"""Escapes, markup, reordering marks, NUL, lone surrogates and secrets from any source have no effect anywhere.

    python -m pytest tests/test_hostile_text.py

The model is the toy with its weights set to zero, so it draws all bytes with equal probability: control characters of
all kinds. Its folder, the task's file, ids, questions, options and subjects hold what a terminal or a browser acts on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import minem
from minem.cli import main
from minem.data.tasks import TOY
from minem.errors import GuardError, UserError
from minem.text import REDACTED, SENTENCE_LIMIT, redact, sentence
from tests.mutations import HOSTILE, assert_harmless

NAME = "n\x1b[2J\x1b]0;owned\x07\x9b31m<script>alert(1)<b>\u202egnp.exe\u2066\u2028 $x_1$ [red]"  # of a file
ARGUMENT = HOSTILE.replace("\x00", "")  # of a command line, which cannot hold NUL
SECRETS = {"HF_TOKEN": "hf_thisIsMySecretToken", "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567"}
TYPED = "sk-typedByMistake123456"  # a secret on the command line
SHORT = ["--set", "sampler.max_new_tokens=24", "--set", "eval.max_new_tokens=24", "--set", "sampler.filter=none"]
SHORT += ["--iterations", "1", "--budget", "1", "--limit", "4", "--set", "eval.diagnostics=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    model = Path(shutil.copytree(TOY / "model", folder / f"model {NAME}"))
    tensors = load_file(model / "model.safetensors")
    save_file({name: 0 * tensor for name, tensor in tensors.items()}, model / "model.safetensors")
    rows = [
        {
            "id": f"{i} {HOSTILE}",
            "question": f"{HOSTILE} {i}?",
            "subject": HOSTILE,
            "choices": {"text": [HOSTILE[:12], f"{i} \u202e<b>"], "label": ["A", "B"]},
            "answerKey": "A",
        }
        for i in range(20)
    ]
    (folder / f"task {NAME}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The charts of `run` are drawn, and hold all kinds of text; drawing takes most of the time of any other page."""
    monkeypatch.setattr("minem.report.figures.draw", lambda *_: "<svg></svg>")
    monkeypatch.setattr("minem.report.charts.plot_accuracy", lambda run, path: path.write_bytes(b""))


def ask(place: Path, *arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert_harmless(result.stdout)
    assert_harmless(result.stderr)
    return result


def model_and_task(place: Path) -> list[object]:
    return ["--model", place / f"model {NAME}", "--task", place / f"task {NAME}.jsonl"]


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    out = place / f"run {NAME}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["minem", "train", "--token", TYPED, f"--api-key={SECRETS['WANDB_API_KEY']}"])
        done = ask(place, "train", *model_and_task(place), *SHORT, "--out", out)
    assert "owned" in done.stderr  # the words are there, without their effect
    return out


def test_the_model_writes_control_characters(run: Path) -> None:
    texts = [json.loads(line)["text"] for line in (run / "iter-01" / "samples.jsonl").read_text().splitlines()]
    written = set("".join(texts))
    assert {chr(code) for code in range(32)} & written - set("\n\t")


def test_a_run_and_its_files_are_harmless(run: Path) -> None:
    names = [path for path in run.rglob("*") if path.suffix in (".json", ".jsonl", ".toml", ".md", ".html", ".txt")]
    assert {"config.toml", "run.json", "samples.jsonl", "README.md", "report.html"} <= {path.name for path in names}
    for path in names:
        if path.name != "tokenizer.json":  # copied byte for byte
            assert_harmless(path.read_text(encoding="utf-8"))


def test_every_command_about_it_is_harmless(place: Path, run: Path, without_charts: None) -> None:
    again = ["train", *model_and_task(place), *SHORT, "--out", run]
    ask(place, *again)
    ask(place, *again, "--json")
    ask(place, *again, "--seed", 3, code=2)  # a difference is refused
    for more in ([], ["--json"], ["--status", "unparsed", "-n", 3], ["--iteration", 1]):
        ask(place, "show", run, *more)
    ask(place, "show", run, "--question", HOSTILE[:-1], code=2)
    ask(place, "show", run, "--question", "\ud800\udcff", code=2)
    ask(place, "report", run, "-o", place / f"page {NAME}.html")
    ask(place, "sample", *model_and_task(place), *SHORT, "--out", place / "samples")
    drawn = place / f"samples {NAME}.jsonl"
    shutil.copy(place / "samples" / "iter-01" / "samples.jsonl", drawn)
    ask(place, "train", *model_and_task(place), *SHORT, "--samples", drawn, "--out", place / "from", code=4)
    few = ["--limit", 4, "--max-new-tokens", 24, "--out", place / f"eval {NAME}"]
    ask(place, "eval", *model_and_task(place), *few)
    ask(place, "eval", *model_and_task(place), *few, "--seed", 1, code=2)


def test_generate_is_harmless(place: Path) -> None:
    prompts = place / f"prompts {NAME}.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i} {HOSTILE}"}) + "\n" for i in range(2)))
    model = ["--model", place / f"model {NAME}", "--max-new-tokens", 60]
    for more in (["--prompt", HOSTILE], ["--prompts", prompts], ["--prompts", prompts, "--chat", "--json"]):
        ask(place, "generate", *model, *more)
    refused = ask(place, "generate", *model, "--prompt", "half \ud800", code=2)
    assert "not valid Unicode" in refused.stderr


def test_compare_is_harmless(place: Path, without_charts: None) -> None:
    out = place / f"compare {NAME}"
    short = ["--set", "sampler.max_new_tokens=24", "--set", "eval.max_new_tokens=24", "--set", "sampler.filter=none"]
    short += ["--set", "eval.diagnostics=0", "--iterations", "1", "--limit", "2"]
    ask(place, "compare", *model_and_task(place), *short, "--samplers", "pps:1", "--seeds", "0", "--out", out)
    for path in (out / "comparison.md", out / "comparison.json", out / "report.html", out / "plan.json"):
        assert_harmless(path.read_text(encoding="utf-8"))
    assert "<script" not in (out / "comparison.md").read_text()
    check_page((out / "report.html").read_text(encoding="utf-8"))


class Elements(HTMLParser):
    """Names of all elements, and all attributes, as a browser's parser finds them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def check_page(page: str) -> None:
    """The page's own two scripts and none besides, no element or handler that a text could have brought."""
    found = Elements()
    found.feed(page)
    assert found.tags.count("script") == 2
    assert found.tags.count("form") == 2
    assert not {"img", "iframe", "object", "embed", "base"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert not [value for name, value in found.attributes if name in ("href", "src") and "javascript:" in str(value)]
    assert_harmless(page)


def test_the_report_holds_no_markup_of_it(place: Path, run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    check_page(page)
    assert "&lt;script&gt;alert(1)" in page or "\\u003cscript\\u003ealert(1)" in page


BAD_ROWS = [
    {"id": HOSTILE, "question": HOSTILE},
    {"id": HOSTILE, "question": {HOSTILE: HOSTILE}},
    {"id": HOSTILE, "question": "?", "choices": {"text": ["a", "b"], "label": [HOSTILE, "B"]}, "answerKey": HOSTILE},
    {"id": HOSTILE, "question": "?", "choices": [HOSTILE], "answer": HOSTILE},
    {HOSTILE: HOSTILE},
    {"id": [HOSTILE], "question": "?", "answer": "1"},
    {"id": "\ud800", "question": "\udfff", "answer": "1"},
    {"id": "x", "question": "?" * 100_000, "answer": "1\n" * 100_000},
]


@pytest.mark.parametrize("number", range(len(BAD_ROWS)))
def test_a_bad_row_is_one_harmless_sentence(place: Path, number: int) -> None:
    path = place / f"bad {number} {NAME}.jsonl"
    path.write_text(json.dumps(BAD_ROWS[number]) + "\n")
    refused = ask(place, "eval", "--task", path, code=2)
    assert len(refused.stderr.splitlines()) == 1
    assert "row 1" in refused.stderr


def test_bad_names_are_one_harmless_sentence(place: Path, tmp_path: Path) -> None:
    config = tmp_path / f"{NAME}.toml"
    config.write_text('[sampler]\n"\\u001b[2J\\u202e" = 1\n')
    commands: list[list[object]] = [
        ["train", config],
        ["train", tmp_path / NAME],
        ["train", "--task", ARGUMENT],
        ["train", "--model", ARGUMENT],
        ["train", "--model", "\udcff"],
        ["train", "--task", "\udcff"],
        ["train", "--sampler", ARGUMENT],
        ["train", "--verdict", ARGUMENT],
        ["train", "--set", ARGUMENT],
        ["train", "--set", f"sampler.{ARGUMENT}=1"],
        ["train", "--set", f"sampler.hint={ARGUMENT}"],
        ["train", f"--{ARGUMENT}"],
        ["train", "--seed", ARGUMENT],
        ["eval", "--split", ARGUMENT],
        ["eval", "--model", "x" * 100_000],
        ["compare", "--samplers", ARGUMENT],
        ["compare", "--seeds", ARGUMENT],
        ["compare", "--models", ARGUMENT],
        ["compare", "--arm", ARGUMENT],
        ["compare", "--arm", f"{ARGUMENT}:sampler.filter=non"],
        ["show", ARGUMENT],
        ["show", "\udcff"],
        ["report", ARGUMENT],
        ["generate", "--prompts", ARGUMENT],
        ["generate", "--prompt", "a", "--model", ARGUMENT],
        [ARGUMENT],
    ]
    for command in commands:
        refused = ask(place, *command, code=2)
        assert len(refused.stderr.splitlines()) == 1, (command, refused.stderr)
        assert len(refused.stderr) < SENTENCE_LIMIT + 200


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_any_encoding_gets_no_traceback(place: Path, run: Path, encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(minem.__file__).parents[1])}
    command = [sys.executable, "-m", "minem", "show", str(run)]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    # click writes UTF-8 if the encoding of a terminal is ASCII
    assert_harmless(done.stdout.decode("latin-1" if encoding == "latin-1" else "utf-8"))


@pytest.mark.parametrize("kind", [UserError, GuardError])
def test_the_message_of_an_error_is_one_harmless_line(kind: Any) -> None:
    for text in (HOSTILE, "a\nb\r\nc\td", "x" * 10**6, "\ud800", ""):
        message = str(kind(text))
        assert_harmless(message)
        assert len(message.splitlines()) <= 1
        assert len(message) < SENTENCE_LIMIT + 100
    assert sentence("begin " + "x" * 9_999 + " what to do").endswith(" what to do")


# ------------------------------------------------------------------------------------------------------------- secrets

TOKENS = [
    "hf_abcdefghijklmnopqrst",
    "sk-proj-abcdefgh12345678",
    "ghp_abcdefghijklmnop1234",
    "github_pat_11ABCDEFG0_xyz",
]


@pytest.mark.parametrize("token", TOKENS)
def test_what_looks_like_a_token_is_not_shown(token: str) -> None:
    for text in (
        f"--x={token}",
        f'{{"token": "{token[-8:]}"}}',
        f"password={token[-8:]}",
        f"Illegal header value b'Bearer {token}\\n'",
        f"{token} is wrong",
        f"https://me:{token}@hub.co/a",
    ):
        assert token not in redact(text)
        assert REDACTED in redact(text)


def test_names_and_paths_are_no_secrets() -> None:
    for text in (
        "--set sampler.max_new_tokens=24",
        "runs/toy.rsm8.toy-llama.s0: the tokenizer names no EOS token: see it",
        "no EOS token: please see tokenizer_config.json, eos_token = <|endoftext|>, --stop-token: x",
        "/home/me/hf_cache/models--Qwen--Qwen2.5-0.5B: 512 tokens, key 7",
        "token_ids must be a list of the ids that were drawn",
        "set HF_TOKEN to a token that may read it",
    ):
        assert redact(text) == text


def test_no_secret_gets_into_a_run_directory(place: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the environment, not from the command line, not by an error that quotes one."""
    for path in [p for p in run.rglob("*") if p.is_file()]:
        content = path.read_bytes()
        for value in (*SECRETS.values(), TYPED):
            assert value.encode() not in content, path
    assert json.loads((run / "run.json").read_text())["command"][1:3] == ["train", "--token"]
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
        message = str(UserError(f"the hub reports: Illegal header value b'Bearer {value}\\n' ({value})"))
        assert value not in message
        assert re.search(r"the hub reports: .*\[redacted\]", message)
