"""The report: the numbers of its charts, which samples it holds, and that nothing in a run can break the page."""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from minem.cli import main
from minem.data.tasks import load_task
from minem.hub import download
from minem.report import figures
from minem.report.page import TEXT_LIMIT, write_report
from minem.report.reader import _load_task, choose, read_run
from minem.runs.directory import read_journal
from minem.statistics import wilson
from tests.minem.made_runs import answer, make_run, sample

MARKUP = "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'> & "
HOSTILE = MARKUP + "\u2028\u202e\x00\x1b[31m\r\n\tend"
SEEN = MARKUP + "\\u2028\\u202e\\u0000\\u001b[31m\n\tend"


def page_of(*runs: Path, **more) -> str:
    out = runs[0].parent / "page.html"
    write_report(runs, out, **more)
    return out.read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    """What the page's script reads, with its compact tables as dicts."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*)</script>', page)
    data = json.loads(text)
    for name in ("samples", "flips"):
        data[name] = [dict(zip(data[name]["columns"], row, strict=True)) for row in data[name]["rows"]]
    return data


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def without_charts(monkeypatch):
    """For tests of numbers and texts: drawing takes nearly all the time of a report."""
    monkeypatch.setattr("minem.report.figures.draw", lambda *_: "<svg></svg>")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A real run, of seconds."""
    out = tmp_path_factory.mktemp("trained") / "run"
    small = ["--limit", 8, "--iterations", 2, "--sampler", "star", "--budget", 4, "--set", "eval.diagnostics=8"]
    small += ["--set", "eval.hinted_draws=1", "--set", "sampler.draws=all"]  # the E-step is small, and so its quarter
    result = invoke("train", *small, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def test_a_run_ends_with_the_report_that_the_command_makes(trained, tmp_path):
    before = hashes(trained)
    result = invoke("report", trained, "-o", tmp_path / "page.html")
    assert (result.exit_code, result.stdout.strip()) == (0, str(tmp_path / "page.html"))
    assert hashes(trained) == before  # a pure reader
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page == (trained / "report.html").read_text(encoding="utf-8")
    assert len(page) < 300_000


def test_everything_that_a_run_measured_is_on_its_page(trained):
    page, journal = (trained / "report.html").read_text(encoding="utf-8"), read_journal(trained)
    for title in ("Accuracy", "Accuracy by cost", "Accepted attempts", "Length of kept rationales", "Tokens drawn"):
        assert f"<strong>{title}</strong>" in page
    for key, (label, sentence) in figures.EXPLAINED.items():
        assert label.lower() in page.lower()
        assert sentence.replace("'", "&#39;") in page
        assert journal["iter-02/diagnostics"][key] is not None
    assert page.count('<svg role="img"') == 8 + 7
    for fact in json.loads((trained / "run.json").read_text())["inputs"].values():
        assert fact in page
    config = (trained / "config.toml").read_text().strip()
    assert config.replace('"', "&#34;").replace("'", "&#39;") in page
    rows = [row for i in (1, 2) for row in read_run(trained).samples(i)]
    found = data_of(page)
    assert found["notes"] == []
    assert [(s["iteration"], s["id"], s["attempt"], s["text"]) for s in found["samples"]] == sorted(
        (r.iteration, r.id, r.attempt, r.text) for r in rows
    )
    hinted = [s for s in found["samples"] if s["kind"] == "hinted"]
    gold = {question.id: question.gold for question in load_task("toy", 16).train}
    assert hinted
    for row in hinted:
        assert f"The correct answer is {gold[row['id']]}" in found["prompts"][row["prompt"]]


def test_runs_that_were_matched_differently_are_not_averaged(tmp_path, without_charts):
    paths = [make_run(tmp_path / str(seed), run__seed=seed) for seed in range(3)]
    facts = json.loads((paths[2] / "run.json").read_text())
    facts["inputs"]["match"] = "kept of rsm:8, pps:1"
    (paths[2] / "run.json").write_text(json.dumps(facts))
    (task,) = figures.by_task([read_run(path) for path in paths])
    two, one = task["legend"]
    assert "mean of 2 seeds" in two["band"]
    assert one["label"].endswith("match kept of rsm:8, pps:1")


def test_several_seeds_are_a_mean_and_their_spread_one_run_its_wilson_interval(tmp_path, without_charts):
    rights = [(10, 15, 18), (9, 13, 20), (11, 12, 16)]
    runs = [make_run(tmp_path / f"s{i}", validation=v, run__seed=i, tokens=1000 + i) for i, v in enumerate(rights)]
    other = make_run(tmp_path / "pps", validation=(10, 12), sampler__name="pps", run__iterations=1)
    (task,) = figures.by_task([read_run(run) for run in [*runs, other]])
    assert [group["label"] for group in task["legend"]] == ["rsm 8", "pps 1"]
    assert "mean of 3 seeds" in task["legend"][0]["band"]
    assert "Wilson" in task["legend"][1]["band"]
    rows = {chart["title"]: chart["rows"] for chart in task["charts"]}
    for i, values in enumerate(zip(*rights, strict=True)):
        mean, spread = statistics.mean(values) / 20, statistics.stdev(values) / 20
        wanted = [f"{100 * x:.1f} %" for x in (mean, mean - spread, mean + spread)]
        assert rows["Accuracy"][i] == ["rsm 8", str(i), wanted[0], f"{wanted[1]} to {wanted[2]}"]
        assert rows["Accuracy by cost"][i][1:3] == [f"{1001 * i:,}", wanted[0]]
    low, high = wilson(12, 20)
    assert rows["Accuracy"][-1] == ["pps 1", "1", "60.0 %", f"{100 * low:.1f} % to {100 * high:.1f} %"]


def test_runs_that_differ_in_more_than_their_seed_are_separate(tmp_path, without_charts):
    runs = [
        make_run(tmp_path / name, **flags)
        for name, flags in {
            "a": {"sampler__budget": 4},
            "b": {"sampler__budget": 4, "run__seed": 1},
            "c": {"sampler__budget": 4, "task__limit": 9},
        }.items()
    ]
    (task,) = figures.by_task([read_run(run) for run in runs])
    assert [group["label"] for group in task["legend"]] == ["rsm 4 · task.limit not set", "rsm 4 · task.limit 9"]
    assert "mean of 2 seeds" in task["legend"][0]["band"]


def test_flips(tmp_path, without_charts):
    base = [answer("a", "wrong", "base a"), answer("b", "accepted"), answer("c", "accepted"), answer("d", "wrong")]
    last = [answer("a", "accepted", "last a"), answer("b", "truncated"), answer("c", "accepted"), answer("d", "wrong")]
    page = page_of(make_run(tmp_path / "run", base=base, last=last))
    found = data_of(page)["flips"]
    assert [(flip["id"], flip["kind"]) for flip in found] == [("b", "became wrong"), ("a", "became right")]
    assert (found[1]["before"], found[1]["after"]) == ("base a", "last a")
    assert found[0]["statuses"] == ["accepted", "truncated"]
    assert "1 became right, 1 became wrong" in page


def test_flips_have_a_limit_that_is_shown_and_both_directions_below_it(tmp_path, monkeypatch, without_charts):
    monkeypatch.setattr("minem.report.page.MOST_FLIPS", 10)
    ids = [f"q{i:02d}" for i in range(30)]
    base = [answer(i, "accepted" if i < "q05" else "wrong") for i in ids]
    last = [answer(i, "wrong" if i < "q05" else "accepted") for i in ids]
    data = data_of(page_of(make_run(tmp_path / "run", base=base, last=last)))
    kinds = [flip["kind"] for flip in data["flips"]]
    assert (kinds.count("became wrong"), kinds.count("became right"), data["flips_total"]) == (5, 5, 30)


def test_unfinished_runs_and_those_being_written(tmp_path, without_charts):
    empty = make_run(tmp_path / "empty", validation=())
    half = make_run(tmp_path / "half", validation=(10, 12), base=[answer("a", "wrong")], samples=[sample("x")])
    (half / "iter-02").mkdir()
    ((half / ".partial").mkdir() or half / ".partial" / "samples.jsonl").write_text('{"id": "cut o')
    with open(half / "journal.jsonl", "a") as journal:
        journal.write('{"stage": "iter-02/estep", "resu')
    page = page_of(empty, half)
    assert page.count("unfinished, in iteration") == 2
    assert [row["id"] for row in data_of(page)["samples"]] == ["x"]
    assert "Nothing is measured yet" in page_of(empty)


def test_hostile_texts_are_text(tmp_path):
    rows = [sample("toy-train-001", text=HOSTILE, answer=HOSTILE), sample(HOSTILE, attempt=2, status=HOSTILE)]
    flips = [answer("q", "wrong", HOSTILE)], [answer("q", "accepted", HOSTILE)]
    run = make_run(tmp_path / "run <b> \u202e", samples=rows, base=flips[0], last=flips[1])
    facts = json.loads((run / "run.json").read_text())
    facts |= {"command": ["minem", HOSTILE], "platform": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    facts["config"]["sampler"]["name"] = HOSTILE
    facts["config"]["mstep"]["lr"] = HOSTILE
    facts["inputs"][HOSTILE] = HOSTILE
    (run / "run.json").write_text(json.dumps(facts))
    table = {"title": HOSTILE, "note": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE, None], [1, 2.5]]}
    other = make_run(tmp_path / "other")
    page = page_of(run, other, comparison={"tables": [table], "plots": [{"title": HOSTILE, "svg": "<svg></svg>"}]})
    assert "window.hurt = 1</script>" not in page
    assert "<img" not in page
    assert page.count("<script") == 2
    for character in "\u2028\u202e\x00\x1b\r":
        assert character not in page
    data = data_of(page)
    shown = next(row for row in data["samples"] if row["id"] == "toy-train-001")
    assert shown["text"] == SEEN
    assert data["runs"][0] == "run <b> \\u202e"


def test_the_page_asks_for_nothing_and_runs_one_script_only(trained):
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""\b(src|href)=["'](?!#|data:,)""", page.replace("xlink:href", "href").split("<script")[0])
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]+)"', page.split("<script")[0])
    assert len(ids) == len(set(ids))
    for used in re.findall(r'(?:url\(|href=")#([^")]+)', page.split("<script")[0]):
        assert used in ids


def test_questions_that_are_gone_or_changed_leave_a_note(tmp_path, without_charts):
    questions = tmp_path / "questions.jsonl"
    rows = [
        {
            "id": f"q{i}",
            "question": f"Is it {i}?",
            "choices": {"text": ["yes", "no"], "label": ["A", "B"]},
            "answerKey": "A",
        }
        for i in range(10)
    ]
    questions.write_text("\n".join(map(json.dumps, rows)))
    task = load_task(str(questions))
    run = make_run(tmp_path / "run", samples=[sample(task.train[0].id)])
    facts = json.loads((run / "run.json").read_text())
    facts["config"]["task"] |= {"name": str(questions), "prompt": "toy"}
    facts["inputs"]["task rows"] = task.rows_sha256
    (run / "run.json").write_text(json.dumps(facts))
    data = data_of(page_of(run))
    assert task.train[0].text in data["prompts"][data["samples"][0]["prompt"]]
    questions.write_text(questions.read_text().replace("Is it", "Was it"))
    for what in ("are not those of the run", "no task or path"):
        _load_task.cache_clear()
        data = data_of(page_of(run))
        assert (data["prompts"], data["samples"][0]["prompt"]) == ([], None)
        (note,) = data["notes"]
        assert what in note
        questions.unlink(missing_ok=True)


def test_the_questions_of_a_hub_task_come_from_the_cache_alone(tmp_path, monkeypatch, without_charts):
    asked = []

    def snapshot_download(*args, local_files_only, **more):
        from huggingface_hub.errors import LocalEntryNotFoundError

        asked.append(local_files_only)
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    run = make_run(tmp_path / "run", samples=[sample("x")])
    facts = json.loads((run / "run.json").read_text())
    facts["config"]["task"]["name"] = "openbookqa"
    (run / "run.json").write_text(json.dumps(facts))
    assert "not in the local cache" in data_of(page_of(run))["notes"][0]
    assert asked == [True]
    with pytest.raises(Exception, match="not in the local cache"):
        download("a/b", "dataset", ["*"])
    assert asked == [True, False]


def test_texts_and_samples_have_limits_that_are_shown(tmp_path, monkeypatch, without_charts):
    monkeypatch.setattr("minem.report.page.MOST_SAMPLES", 5)
    rows = [sample(f"q{i}", iteration, text="x" * (TEXT_LIMIT + 7)) for iteration in (1, 2) for i in range(4)]
    data = data_of(page_of(make_run(tmp_path / "run", samples=rows)))
    assert (len(data["samples"]), data["samples_total"]) == (4, 8)
    assert data["samples"][0]["text"] == "x" * TEXT_LIMIT + " … (7 more characters)"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 30)), max_size=60),
    st.integers(1, 20),
    st.integers(10, 300),
    st.randoms(),
)
def test_chosen_samples_are_all_attempts_at_the_same_questions_in_any_order(rows, most, characters, random):
    """Within both limits except for a single question; none is left out that would fit."""
    numbered = [
        (run, SimpleNamespace(**sample(f"q{q}", attempt=n, text="x" * length)))
        for n, (run, q, length) in enumerate(rows)
    ]

    def chosen_of(pairs):
        runs = [SimpleNamespace(samples=lambda of=[row for run, row in pairs if run == n]: of) for n in range(3)]
        chosen, total = choose(runs, most, characters)
        assert total == len(pairs)
        return chosen

    chosen = chosen_of(numbered)
    ids = {row.id for _, row in chosen}
    mixed = list(numbered)
    random.shuffle(mixed)
    assert {row.id for _, row in chosen_of(mixed)} == ids
    assert len(chosen) <= most
    if len(ids) > 1:
        assert len(chosen) == sum(row.id in ids for _, row in numbered)
        assert sum(len(row.text) for _, row in chosen) <= characters
    if len(numbered) <= most and sum(len(row.text) for _, row in numbered) <= characters:
        assert len(chosen) == len(numbered)


def test_a_comparison_comes_first(tmp_path, without_charts):
    table = {"title": "Samplers", "note": "five seeds", "columns": ["sampler", "accuracy"], "rows": [["rsm:8", "91 %"]]}
    run = make_run(tmp_path / "run")
    page = page_of(run, comparison={"tables": [table], "plots": [{"title": "Plot", "svg": "<svg></svg>"}], "other": 1})
    assert page.index('id="comparison"') < page.index('id="runs"')
    assert '<th scope="row">rsm:8</th><td>91 %</td>' in page
    assert "five seeds" in page
    assert "<strong>Plot</strong></figcaption><svg></svg>" in page
    assert 'id="comparison"' not in page_of(run)


def test_warnings_of_the_iterations_are_shown(tmp_path, without_charts):
    sentence = "the loss did not fall, <b>really</b>"
    fell = "hinted acceptance fell from 90.0 % to 50.0 % since iteration 1"
    extra = {"iter-02/mstep": {"warnings": [sentence]}, "iter-01/mstep": {}}
    extra |= {f"iter-0{i}/diagnostics": {"hinted": 0.5, "warnings": [fell] * (i - 1)} for i in (1, 2)}
    page = page_of(make_run(tmp_path / "run", extra=extra))
    assert f"run, iteration 2: {fell}" in page
    assert figures.EXPLAINED["hinted"][1] in page
    assert "run, iteration 2: the loss did not fall, &lt;b&gt;really" in page
    assert "run, iteration 1:" not in page


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: (run / "run.json").unlink(), "run.json cannot be read"),
        (lambda run: (run / "run.json").write_text("[1]"), "holds a JSON list"),
        (lambda run: (run / "run.json").write_text('{"config": {"task": {}}}'), "holds no config"),
        (lambda run: (run / "journal.jsonl").write_text('{"stage": 1}\n'), "journal.jsonl, line 1: damaged"),
        (lambda run: (run / "iter-01" / "samples.jsonl").write_text('{"id": 7}\n'), "a row has no id"),
        (
            lambda run: (run / "iter-01" / "samples.jsonl").write_text("no\n"),
            "samples.jsonl, line 1: not a JSON object",
        ),
        (lambda run: replace_by(run / "iter-01" / "samples.jsonl", os.mkfifo), "samples.jsonl is not a file"),
        (
            lambda run: replace_by(run / "iter-01" / "samples.jsonl", lambda path: path.symlink_to(run / "run.json")),
            "samples.jsonl is a link that leads out of its folder",
        ),
    ],
)
def test_what_is_no_run_is_one_sentence(tmp_path, damage, sentence, without_charts):
    run = make_run(tmp_path / "run", samples=[sample("x")])
    damage(run)
    for command in (["report", run, "-o", tmp_path / "page.html"], ["show", run]):
        result = invoke(*command)
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
        assert sentence in result.stderr
    assert not (tmp_path / "page.html").exists()


def replace_by(path, make):
    path.unlink()
    make(path)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    run = make_run(tmp_path / "run")
    for out in (tmp_path / "missing" / "page.html", tmp_path, Path("/"), Path()):
        result = invoke("report", run, "-o", out)
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
        assert f"the report {out} cannot be written" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert "RUN..." in invoke("report").stderr


def test_a_report_replaces_nothing_but_a_report(tmp_path, monkeypatch, without_charts):
    """-o run/journal.jsonl replaced the journal of a run, and -o /dev/null the device."""
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run", samples=[sample("x")])
    os.mkfifo("pipe")
    Path("notes.html").write_text("<!doctype html>mine")
    Path("link").symlink_to("notes.html")
    Path("gone").symlink_to("nowhere")
    Path("door").symlink_to(run)
    inside = ("run/journal.jsonl", "run/report.html", "run/iter-01/new.html", "door/report.html")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out in ("pipe", "notes.html", "link", "gone", "/dev/null", *inside):
        result = invoke("report", run, "-o", out)
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), out
        assert (f"-o {out} lies in the run" if out in inside else "no report of minem") in " ".join(
            result.stderr.split()
        )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept
    assert invoke("report", run).exit_code == 0
    page = Path("report.html").read_bytes()
    Path("report.html").write_bytes(page[:900])  # of an earlier report
    assert invoke("report", run).exit_code == 0
    assert Path("report.html").read_bytes() == page
