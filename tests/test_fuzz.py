"""Fuzzing: any damaged file is accepted, or refused in one sentence that names it. No traceback and no hang.

    python -m pytest tests/test_fuzz.py                 # 250 cases, the same each time; their number is printed
    python -m pytest tests/test_fuzz.py -m slow         # thousands, other ones each time

Files that need much time or memory (deep nesting, templates that never end) are out of scope.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from click.testing import CliRunner
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import minem
from minem.cli import main
from minem.config import Config, MStepSection, load_config, to_toml
from minem.data import verdict
from minem.data.tasks import TOY, Question, load_task
from minem.em.samples_file import read_samples
from minem.em.weighting import make_examples
from minem.errors import UserError
from minem.model.chat_template import render
from minem.model.tokenizer import Tokenizer
from minem.runs.record import fingerprint
from minem.text import clean, visible
from tests.minem.folders import toy_prompts
from tests.minem.made_runs import answer, make_run, sample
from tests.mutations import (
    HOSTILE,
    ODD_TEXTS,
    accepted_or_refused,
    assert_harmless,
    damaged_bytes,
    damaged_json,
    fuzz,
)

SECONDS = 180  # of one case before it counts as a hang and the process ends with its stack; usual: a few hundredths


def cases(quick: int, thorough: int) -> Any:
    """Run the test with `quick` cases, and in the slow suite with `thorough` ones, which find what 250 may miss."""
    slow = pytest.param(thorough, id="thorough", marks=pytest.mark.slow)
    return pytest.mark.parametrize("number", [pytest.param(quick, id="quick"), slow])


@contextmanager
def watched() -> Iterator[None]:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def tried(what: str, number: int, strategy: st.SearchStrategy[Any], act: Callable[[Any], Any], *names: str) -> None:
    """`act` on every case ends well or in one sentence with one of the names; both must have happened."""
    ends = set()

    def check(case: Any) -> None:
        with watched():
            ends.add(accepted_or_refused(lambda: act(case), *names))

    fuzz(what, number, strategy, check)
    assert ends == {True, False}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TOY / "model", tmp_path / "model"))


def load_and_run(folder: Path) -> None:
    """What is accepted must also work."""
    network, tokenizer = minem.load(folder)
    with torch.inference_mode():
        assert network(torch.tensor([[1, 2, 3]])).shape == (1, 3, network.config.vocab_size)
    tokenizer.encode("The best answer is 4")


@cases(20, 800)
def test_config_json(model: Path, number: int) -> None:
    good = json.loads((model / "config.json").read_text())
    scaled = {**good, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}
    scaled["rope_scaling"] |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    yarn = {**good, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "mscale": 1.0}}

    def act(data: bytes) -> None:
        (model / "config.json").write_bytes(data)
        load_and_run(model)

    tried("config.json", number, st.one_of(*map(damaged_json, (good, scaled, yarn))), act, str(model))


@cases(18, 400)
def test_small_files_of_a_model(model: Path, number: int) -> None:
    good = json.loads((model / "tokenizer_config.json").read_text())
    good["added_tokens_decoder"] = {"257": {"content": "<|end|>", "special": True, "lstrip": False}}
    named = {"chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}]}
    strategies = {
        "generation_config.json": damaged_json({"eos_token_id": [257, 3], "temperature": 0.7}),
        "tokenizer_config.json": st.one_of(damaged_json(good), damaged_json({**good, **named})),
        "special_tokens_map.json": damaged_json({"eos_token": {"content": "<|end|>"}, "bos_token": "<|begin|>"}),
        "chat_template.jinja": damaged_bytes(b"{{ messages[0].content }}"),
    }

    def act(case: tuple[str, bytes]) -> None:
        for name in strategies:
            (model / name).unlink(missing_ok=True)
        (model / case[0]).write_bytes(case[1])
        tokenizer = Tokenizer.from_folder(model)
        if tokenizer.chat_template is not None:
            tokenizer.chat([{"role": "user", "content": "Hi"}])

    one = st.one_of(*(st.tuples(st.just(name), strategy) for name, strategy in strategies.items()))
    tried("small files of a model", number, one, act, str(model))


@cases(20, 900)
def test_tokenizer_json(model: Path, number: int) -> None:
    good = json.loads((model / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "aa"}
    steps = {**good, "normalizer": {"type": "Sequence", "normalizers": [replace, {"type": "NFC"}] * 2}}
    steps["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a|aa)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    steps["padding"] = {"strategy": {"Fixed": 8}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0}
    steps["padding"] |= {"pad_type_id": 0, "pad_token": "a"}
    # The vocabulary is long and would draw nearly all the damage.
    short = {**good, "model": {**good["model"], "vocab": dict(list(good["model"]["vocab"].items())[:20]), "merges": []}}

    def act(data: bytes) -> None:
        (model / "tokenizer.json").write_bytes(data)
        tokenizer = Tokenizer.from_folder(model)
        for text in ("The best answer is (B).", HOSTILE[:-1], "a" * 300, "\u00e9\u65e5\U0001f642"):
            tokenizer.decode(tokenizer.encode(text))

    tried("tokenizer.json", number, st.one_of(*map(damaged_json, (good, steps, short))), act, str(model))


def test_links_and_pipes_are_refused_before_a_run_begins(model: Path) -> None:
    """A file that is only copied is checked on loading, not hours later; a pipe is not hashed without end."""
    os.mkfifo(model / "other.safetensors")
    with watched(), pytest.raises(UserError, match=r"other.safetensors is not a file"):
        fingerprint(model)
    (model / "vocab.json").symlink_to(__file__)
    with watched(), pytest.raises(UserError, match=r"vocab.json is a link that leads out of its folder"):
        minem.load(model)


@pytest.mark.parametrize("id_", [278, 5_000_000, 2**70])
def test_an_eos_that_the_model_cannot_draw_is_refused(model: Path, id_: int) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, id_]}))
    with pytest.raises(UserError, match=rf"eos_token_id {id_} is beyond the vocab_size of 278"):
        minem.load(model)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@cases(20, 800)
def test_safetensors_headers(model: Path, number: int) -> None:
    header, tensors = header_of(model / "model.safetensors")
    few = {name: header[name] for name in list(header)[:4]}  # their offsets leave the rest of the file uncovered
    whole = st.just(json.dumps(header).encode())  # undamaged, so that a quick run accepts some
    lengths = st.sampled_from([None] * 30 + [0, 1, 2**20, 2**31, 2**60, 2**63, 2**64 - 1])

    def act(case: tuple[bytes, int | None, int]) -> None:
        data, length, cut = case
        claimed = len(data) if length is None else length
        content = struct.pack("<Q", claimed) + data + tensors
        (model / "model.safetensors").write_bytes(content[: len(content) - cut])
        load_and_run(model)

    cuts = st.sampled_from([0] * 12 + [1, 10**6, 3_200_000])
    strategy = st.tuples(st.one_of(damaged_json(header), damaged_json(few), whole), lengths, cuts)
    tried("safetensors headers", number, strategy, act, str(model))


@cases(18, 400)
def test_shard_indexes(model: Path, number: int) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, model / file)
    outside = model.parent / "outside.safetensors"
    save_file({name: tensors[name] for name in names[:20]}, outside)
    good = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    moved = {**good["weight_map"], **dict.fromkeys(names[:20], "../outside.safetensors")}
    absolute = {**good["weight_map"], **dict.fromkeys(names[:20], str(outside))}
    goods = [good, {"weight_map": moved}, {"weight_map": absolute}]
    whole = st.just(json.dumps(good).encode())

    def act(data: bytes) -> None:
        (model / "model.safetensors.index.json").write_bytes(data)
        load_and_run(model)
        text = data.decode(errors="replace")
        assert "outside" not in text or "../outside.safetensors" not in json.loads(text)["weight_map"].values()

    tried("shard indexes", number, st.one_of(whole, *map(damaged_json, goods)), act, str(model))


TOML_VALUES = ["0", "-1", "1e400", "nan", "inf", "true", "[]", "{}", "[1, [2]]", "{a = 1}", '""', '"x"', "1979-05-27"]
TOML_VALUES += ["07:32:00", "0x7fffffffffffffffff", "9" * 4000, '"\\u202e\\u001b[31m"', '"""\na\n"""', "a", "", "= 3"]
TOML_VALUES += ["[" * 900, "'\u202e'", "'a\\u0000'", '"\\u0000"']


@cases(20, 1200)
def test_toml_configs(tmp_path: Path, number: int) -> None:
    lines = to_toml(Config()).splitlines()
    path = tmp_path / "config.toml"

    @st.composite
    def damaged(draw: st.DrawFn) -> bytes:
        changed = list(lines)
        for _ in range(draw(st.integers(0, 3))):
            at = draw(st.integers(0, len(changed) - 1))
            key, _, _ = changed[at].partition(" = ")
            added = [
                f"{key} = {draw(st.sampled_from(TOML_VALUES))}",
                f"{draw(st.text(max_size=9))} = 1",
                f"[{draw(st.text(max_size=9))}]",
            ]
            changed[at] = draw(st.sampled_from([*added, "x = " + "{a = " * 500]))
        data = "\n".join(changed).encode("utf-8", "replace")
        return draw(damaged_bytes(data)) if draw(st.booleans()) else data

    def act(data: bytes) -> None:
        path.write_bytes(data)
        config = load_config(path)
        path.write_text(to_toml(config))
        assert load_config(path) == config

    tried("TOML configs", number, damaged(), act, str(path))


ROWS: list[dict[str, Any]] = [
    {"id": "q", "question": "What?", "choices": {"text": ["light", "soup"], "label": ["A", "B"]}, "answerKey": "A"},
    {"id": 7, "question_stem": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
    {"question": "2 + 2?", "subject": "sums", "choices": ["3", "4", "5", "6"], "answer": 1},
    {"id": "q", "question": "9 + 9?", "answer": "it is\n#### 18"},
    {"id": "q", "question": "9 + 9?", "answer": 18.5},
]


def look_at(path: Path) -> None:
    """Load a task, and do with each question what a run does with it."""
    task = load_task(str(path))
    for question in (*task.train, *task.test):
        for check in (verdict.strict, verdict.flexible, verdict.states_early):
            check(f"It is {question.gold}.\nThe best answer is {question.gold}", question)


@cases(20, 1200)
def test_jsonl_rows(tmp_path: Path, number: int) -> None:
    path = tmp_path / "rows.jsonl"

    def act(rows: list[bytes]) -> None:
        path.write_bytes(b"\n".join(rows))
        look_at(path)

    few = [st.lists(damaged_json(row, 2), min_size=4, max_size=6) for row in ROWS]
    numbered = [st.just([json.dumps({**row, "id": f"q{i}"}).encode() for i in range(6)]) for row in ROWS]
    pairs = list(zip(numbered, ROWS, strict=True))
    mixed = [st.tuples(same, damaged_json(row, 2)).map(lambda t: [*t[0], t[1]]) for same, row in pairs]
    tried("JSONL rows", number, st.one_of(*few, *mixed), act, "rows.jsonl")


@cases(16, 800)
def test_parquet_bytes(tmp_path: Path, number: int) -> None:
    path = tmp_path / "rows.parquet"
    goods = []
    for row in ROWS[:4]:
        table = pyarrow.Table.from_pylist([{**row, "id": f"q{i}", "odd": HOSTILE[:-1]} for i in range(40)])
        for codec in ("snappy", "zstd", "none"):
            pyarrow.parquet.write_table(table, path, compression=codec)
            goods.append(path.read_bytes())

    def act(data: bytes) -> None:
        path.write_bytes(data)
        look_at(path)

    tried("parquet bytes", number, st.one_of(*map(damaged_bytes, goods)), act, "rows.parquet")


@cases(16, 500)
def test_samples_of_others(tmp_path: Path, number: int) -> None:
    path, task, (network, tokenizer) = tmp_path / "samples.jsonl", load_task("toy", 8), minem.load("toy")
    size, vocabulary = network.config.max_position_embeddings, network.config.vocab_size
    ids = [*tokenizer.encode("The best answer is 1", add_special_tokens=False), 257]
    good = [sample(question.id, token_ids=ids, text=tokenizer.decode(ids)) for question in task.train[:3]]
    damaged = st.lists(st.one_of(*(damaged_json(row, 2) for row in good)), min_size=1, max_size=3).map(b"\n".join)
    files = damaged | st.just("\n".join(map(json.dumps, good)).encode())

    def act(case: tuple[bytes, str]) -> None:
        path.write_bytes(case[0] + b"\n")
        read = read_samples(path, task, toy_prompts(tokenizer), size, vocabulary, case[1], drop_leaks=False)
        assert all(
            example.weight > 0
            for example in make_examples(read, task, toy_prompts(tokenizer), MStepSection(weights=case[1]))
        )

    tried("samples.jsonl", number, st.tuples(files, st.sampled_from(["equal", "importance"])), act, "samples.jsonl")


@cases(5, 150)
def test_run_directories_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr("minem.report.figures.draw", lambda *_: "<svg></svg>")  # nearly all the time of a report
    rows = [sample("toy-train-001"), sample("toy-train-002", attempt=2, status="wrong", text=HOSTILE)]
    answers = [answer("a", "wrong"), answer("b", "accepted")]
    run = make_run(tmp_path / "run", samples=rows, base=answers, last=answers[::-1])
    goods = {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.suffix in (".json", ".jsonl")}

    @st.composite
    def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
        name = draw(st.sampled_from(sorted(goods)))
        if name.endswith(".json"):
            return name, draw(damaged_json(json.loads(goods[name])))
        lines = goods[name].splitlines()
        at = draw(st.integers(0, len(lines) - 1)) if lines else 0
        if lines:
            lines[at] = draw(damaged_json(json.loads(lines[at])))
        return name, b"\n".join(lines) + b"\n"

    def check(case: tuple[str, bytes]) -> None:
        (run / case[0]).write_bytes(case[1])
        try:
            with watched():
                for command in (["show", str(run)], ["report", str(run), "-o", str(tmp_path / "page.html")]):
                    done = CliRunner().invoke(main, command)
                    if not isinstance(done.exception, SystemExit | None):
                        raise done.exception
                    assert done.exit_code in (0, 2), case[0]
                    assert_harmless(done.stdout + done.stderr)
                    if done.exit_code == 2:
                        assert len(done.stderr.splitlines()) == 1
                        assert str(run) in done.stderr
        finally:
            (run / case[0]).write_bytes(goods[case[0]])

    fuzz("run directories", number, damaged(), check)


PIECES: list[str] = ["{{ messages[0].content }}", "{{ bos_token }}", "{% for m in messages %}", "{% endfor %}"]
PIECES += [
    "{{ loop }}",
    "{{ m }}",
    "{% for i in range(9) %}",
    "{% for i in range(10**9) %}",
    "{% if x %}",
    "{% else %}",
]
PIECES += [
    "{% endif %}",
    "{% macro f(n) %}",
    "{{ f(n) }}",
    "{{ f(1) }}",
    "{% endmacro %}",
    "{{ ''.__class__.__mro__ }}",
]
PIECES += ["{% set n = namespace(x='ab') %}", "{{ n.x }}", "{% set n.x = 1 %}", "{{ messages|tojson }}"]
PIECES += ["{{ raise_exception('a') }}", "{{ cycler.__init__.__globals__ }}", "{{ self }}", "{{ messages.append(1) }}"]
PIECES += [
    "{{ '",
    "{%",
    "{{ " + "(" * 300,
    "{# ",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% break %}",
]
PIECES += ["{{ strftime_now() }}", "{% generation %}", "{% endgeneration %}", "{{ messages|map('upper')|list }}"]
PIECES += ["{{ x|sort|unique|list }}", "\u202e", HOSTILE, "{% raw %}", "{{ dict(a=1)|pprint }}", "{{ 'x'|urlize }}"]


@cases(18, 500)
def test_chat_templates(number: int) -> None:
    chat = {"messages": [{"role": "user", "content": HOSTILE}], "bos_token": "<s>", "add_generation_prompt": True}

    sources = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)
    tried("chat templates", number, sources, lambda source: render(source, chat), "cannot be read", "fails on")


QUESTIONS = [
    Question("q", "What?", ("light", "soup"), ("A", "B"), "A"),
    Question("q", "What?", tuple("abcdefghijkl"), tuple(str(i) for i in range(1, 13)), "1"),
    Question("q", "What?", (), (), "18"),
    Question("q", "What?", (), (), "Paris (France)"),
]
WORDS = [
    "The best answer is",
    "the answer is",
    "A",
    "B",
    "12",
    "18",
    "$1,000.00",
    "or",
    "(",
    ")",
    "**",
    "\\boxed{",
    "}",
    ":",
]
WORDS += ["as given", "the hint says", "####", "\n", ".", " ", "Paris (France)", "1/0", "-", "1e9", "\uff21", "\u200b"]
WORDS += [
    "is correct",
    "\\frac{1}{0}",
    "9" * 50,
    "because",
    "option",
    "since we know that the correct answer is",
    "_",
    "`",
]
WORDS += [HOSTILE]


@cases(25, 1500)
def test_what_a_model_writes(number: int) -> None:
    parts = st.lists(st.sampled_from(WORDS) | st.text(max_size=10), max_size=30).map(" ".join)
    long = st.tuples(parts, st.sampled_from([1, 1, 1, 50, 1000])).map(lambda t: (t[0] * t[1])[:20_000])

    def check(text: str) -> None:
        with watched():
            for question in QUESTIONS:
                for read in (verdict.strict, verdict.flexible):
                    found = read(text, question)
                    assert found is None or (found in question.labels if question.labels else isinstance(found, str))
                verdict.states_early(text, question)
            verdict.number(text, QUESTIONS[2])
            verdict.cites_hint(text)
            assert_harmless(clean(text))
            assert_harmless(visible(text))

    fuzz("model outputs", number, long, check)


@cases(16, 800)
def test_token_ids_and_prompts(number: int) -> None:
    tokenizer = Tokenizer.from_folder(TOY / "model")
    ids = st.lists(st.integers(0, 300) | st.sampled_from([-1, 2**31, 2**32, 2**64, 10**30]), max_size=20)
    texts = st.text(st.characters(exclude_categories=()), max_size=60) | st.sampled_from(ODD_TEXTS)

    def act(case: list[int] | str) -> None:
        if isinstance(case, list):
            tokenizer.decode(case)
            return
        tokenizer.encode(case)
        tokenizer.chat([{"role": "user", "content": case}])

    tried("token ids and prompts", number, ids | texts, act, str(TOY / "model"), "is not valid Unicode")


@cases(18, 800)
def test_odd_values_as_json(tmp_path: Path, number: int) -> None:
    """The strict parser itself: what it accepts, Python's own reads the same."""
    from minem.files import read_json

    path = tmp_path / "value.json"

    def act(data: bytes) -> None:
        path.write_bytes(data)
        assert read_json(path) == json.loads(data)

    tried("JSON", number, damaged_json({"a": [1, 2, {"b": "c"}], "d": 0.5}), act, "value.json")


def test_no_pickle_is_ever_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with pickles in all usual places: what safetensors there are is read, and without them it is refused."""
    ran = model.parent / "ran"
    payload = b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR."
    for name in (
        "pytorch_model.bin",
        "model.bin",
        "consolidated.00.pth",
        "optimizer.pt",
        "training_args.bin",
        "model.pkl",
    ):
        (model / name).write_bytes(payload)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was about to be read")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.load", "_pickle.loads", "torch.load"):
        monkeypatch.setattr(name, refuse)
    load_and_run(model)
    (model / "model.safetensors").write_bytes(payload + b"\0" * 2**20)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        minem.load(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing \(other formats are not read"):
        minem.load(model)
    assert not ran.exists()


def test_the_source_names_no_way_to_read_a_pickle() -> None:
    root = Path(minem.__file__).parent
    files = [path for top in (root, root / "data", root / "kernels") for path in top.rglob("*.py")]
    assert len(files) > 60
    for path in files:
        for word in ("pickle", "torch.load(", "joblib", "marshal", "shelve", "eval(", "yaml"):
            text = path.read_text().replace(".eval()", "")
            found = [line for line in text.splitlines() if word in line and "def " not in line]
            allowed = word == "eval(" and all("_eval(" in line or "__eval(" in line for line in found)
            assert not found or allowed, f"{path.name}: {found}"
