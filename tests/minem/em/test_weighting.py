"""The objective: which tokens are trained and with which weight, against byte offsets, float64 and whole runs."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from minem.cli import main
from minem.config import MStepSection
from minem.data.tasks import TOY, load_task
from minem.em.estep import encode_prompt
from minem.em.mstep import MStep, loss_divisor
from minem.em.packing import Example, Step
from minem.em.weighting import SMALLEST, add_plain_logprobs, rationale_tokens, weigh
from minem.errors import GuardError, UserError
from minem.files import read_rows, write_rows
from minem.model.tokenizer import Tokenizer
from minem.model.weights import load
from minem.runs.directory import read_journal

SMALL = ["--limit", 24, "--iterations", 1, "--set", "eval.samples=0", "--set", "mstep.batch_size=8"]
SMALL += ["--set", "eval.diagnostics=0"]


def train(out: Path, *more: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in ("train", *SMALL, "--out", out, *more)])


def ok(result: Result) -> Result:
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def rows_of(run: Path, name: str = "accepted", iteration: int = 1) -> list[dict[str, Any]]:
    return list(read_rows(run / f"iter-{iteration:02d}" / f"{name}.jsonl"))


class Recorded:
    """Examples that M-steps were given, in place of `MStep.run`'s training them unseen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.examples: list[Any] = []
        run = MStep.run

        def watched(mstep, examples, *rest):
            self.examples = list(examples)
            return run(mstep, examples, *rest)

        monkeypatch.setattr(MStep, "run", watched)


# ------------------------------------------------------------------------------------------------------------ weights

log_ratios = st.lists(st.tuples(st.sampled_from("abc"), st.floats(-1e4, 1e4)), max_size=12)


@settings(max_examples=200, deadline=None)
@given(log_ratios)
def test_importance_weights_are_a_softmax_of_the_log_ratios_of_each_question(draws):
    rows = [{"id": id_, "logprob_plain": ratio - 7.0, "logprob_q": -7.0} for id_, ratio in draws]
    found = weigh(rows, "importance", ["row"] * len(rows))
    for id_ in {id_ for id_, _ in draws}:
        members = [i for i, (own, _) in enumerate(draws) if own == id_]
        ratios = torch.tensor([rows[i]["logprob_plain"] + 7.0 for i in members], dtype=torch.float64)
        assert [found[i] for i in members] == pytest.approx(ratios.softmax(0).clamp(min=SMALLEST).tolist(), rel=1e-12)
    assert all(float(torch.tensor(weight, dtype=torch.float32)) > 0 for weight in found)


def test_the_other_weights_need_nothing_but_ids():
    rows = [{"id": id_} for id_ in ("a", "b", "a", "a")]
    assert weigh(rows, "equal", [""] * 4) == [1.0] * 4
    assert weigh(rows, "question", [""] * 4) == [1 / 3, 1.0, 1 / 3, 1 / 3]
    assert weigh([], "importance", []) == []


@pytest.mark.parametrize("field", ["logprob_plain", "logprob_q"])
@pytest.mark.parametrize("value", [None, "x", True, 10**400, [1]])
def test_a_row_that_cannot_be_weighed_is_named_with_its_file(field, value, tmp_path):
    """Among them a number that is too large for a float, which JSON allows."""
    questions = load_task("toy", 24).train
    row = {"id": questions[0].id, "token_ids": [5, 6], "logprob_plain": -1.0, "logprob_q": -2.0, field: value}
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"id": "x", "status": "wrong"}\n' + json.dumps(row) + "\n")
    weighed = ["--set", "mstep.weights=importance", "--set", "sampler.draws=all"]
    result = train(tmp_path / "run", "--samples", samples, *weighed)
    assert result.exit_code == 2
    assert f"{samples}, row 2: {field} is " in result.stderr.replace("\n", "")
    assert "mstep.weights" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_weighed(value):
    for row in ({"logprob_plain": value, "logprob_q": -1.0}, {"logprob_plain": -1.0, "logprob_q": value}):
        with pytest.raises(UserError, match=r"row 7: logprob_.* a finite number"):
            weigh([{"id": "a", **row}], "importance", ["row 7"])


@pytest.mark.parametrize("kind", ["question", "importance"])
def test_weights_that_need_every_accepted_draw_are_refused_without(kind, tmp_path):
    result = train(tmp_path / "run", "--set", f"mstep.weights={kind}")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert f'mstep.weights = "{kind}"' in result.stderr
    assert 'sampler.draws = "all"' in result.stderr
    assert not (tmp_path / "run").exists()


# The toy under "justify" bends its last step, so hinted draws are far from its posterior.
WEIGHED = ["--sampler", "star", "--budget", 4, "--set", "sampler.hint=justify", "--set", "sampler.draws=all"]
WEIGHED += ["--set", "mstep.weights=importance", "--iterations", 2]


@pytest.fixture(scope="module")
def hinted(tmp_path_factory) -> Path:
    """star with several hinted draws of each question that it failed at, weighed by importance."""
    out = tmp_path_factory.mktemp("runs") / "importance"
    ok(train(out, *WEIGHED, "--set", "run.keep=all"))
    return out


def test_hinted_draws_are_scored_at_theta_old_under_the_plain_prompt(hinted):
    """Against one whole sequence through the model that the iteration began with, nothing packed, in float64."""
    questions = {question.id: question for question in load_task("toy", 24).train}
    for iteration, model in ((1, "toy"), (2, hinted / "iter-01" / "model")):
        policy, tokenizer = load(model)
        rows = rows_of(hinted, "samples", iteration)
        assert {(row["prompt"], row["status"] == "accepted") for row in rows} >= {("hinted", True), ("plain", False)}
        for row in rows:
            if row["prompt"] == "hinted" and row["status"] != "accepted":
                assert row["logprob_plain"] is None
                continue
            prompt, ids = encode_prompt(tokenizer, questions[row["id"]]), row["token_ids"]
            with torch.no_grad():
                logits = policy(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
            logprobs = logits.double().log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
            assert row["logprob_plain"] == pytest.approx(float(logprobs.sum()), abs=2e-4)
        assert rows_of(hinted, "accepted", iteration) == [row for row in rows if row["status"] == "accepted"]


def test_a_run_trains_with_these_weights_and_so_does_the_m_step_alone(hinted, tmp_path, monkeypatch):
    recorded = Recorded(monkeypatch)
    ok(train(tmp_path / "alone", "--samples", hinted / "iter-01" / "samples.jsonl", *WEIGHED))
    rows = rows_of(hinted)
    assert [example.weight for example in recorded.examples] == weigh(rows, "importance", [""] * len(rows))
    assert len({round(example.weight, 3) for example in recorded.examples}) > 5  # hinted draws differ from the model's
    ours, theirs = (folder / "iter-01" / "model" / "model.safetensors" for folder in (tmp_path / "alone", hinted))
    assert ours.read_bytes() == theirs.read_bytes()


def test_plain_draws_weigh_alike_within_their_question(tmp_path, monkeypatch):
    recorded, found = Recorded(monkeypatch), {}
    for kind in ("question", "importance"):
        ok(train(tmp_path / kind, "--budget", 3, "--set", "sampler.draws=all", "--set", f"mstep.weights={kind}"))
        found[kind] = [(example.id, example.token_ids, example.weight) for example in recorded.examples]
    accepted = [row["id"] for row in rows_of(tmp_path / "question")]
    assert len(accepted) > len(set(accepted))
    assert [weight for *_, weight in found["question"]] == [1 / accepted.count(id_) for id_ in accepted]
    for one, other in zip(found["question"], found["importance"], strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2], rel=1e-4)


def test_a_draw_that_cannot_be_scored_stops_with_a_guard():
    model, tokenizer = load("toy")
    question = load_task("toy", 24).train[0]
    row = {"id": question.id, "token_ids": [5, 6], "kept": True, "logprob_plain": None}
    with torch.no_grad():
        model.get_parameter(next(iter(dict(model.named_parameters())))).fill_(math.nan)
    with pytest.raises(GuardError, match=f"question '{question.id}': the log-probability"):
        add_plain_logprobs([row], {question.id: question}, model, tokenizer, 512)


# ------------------------------------------------------------------------------------------------------ answer tokens


def byte_characters() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes: printable ones stand for themselves, others come after."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = byte_characters()


def byte_level(tokenizer: Tokenizer, id_: int) -> bytes:
    """What a token of a byte-level BPE adds to the text; special ones nothing."""
    if id_ in tokenizer.backend.get_added_tokens_decoder():
        return b""
    return bytes(BYTES[character] for character in tokenizer.backend.id_to_token(id_))


def make_crossing() -> Tokenizer:
    """A byte-level vocabulary with tokens that reach over the line break, as merges of other texts may."""
    pieces = ["\nThe", "\n**", ".\n", ".\nThe best answer", "answer is", "A\n", "\u00e9\n", "best ", "\n\n"]
    writes = {byte: character for character, byte in BYTES.items()}
    vocabulary = {character: i for i, character in enumerate(BYTES)}
    for piece in pieces:
        vocabulary["".join(writes[byte] for byte in piece.encode())] = len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(Path(), backend, {"eos_token": "</s>"}, None, frozenset({backend.token_to_id("</s>")}))


def make_byte_fallback() -> Tokenizer:
    """As Llama 2's: words, and <0x..> for each byte of all else; unfinished bytes decode to a mark each."""
    words = ["The", "best", "answer", "is", "A", "B", " ", "**", ".", "Since"]
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    vocabulary |= {word: 257 + i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["</s>"])
    return Tokenizer(Path(), backend, {"eos_token": "</s>"}, None, frozenset({backend.token_to_id("</s>")}))


def fallback_bytes(tokenizer: Tokenizer, id_: int) -> bytes:
    token = tokenizer.backend.id_to_token(id_)
    if token == "</s>":
        return b""
    return bytes([int(token[1:-1], 16)]) if token.startswith("<0x") else token.encode()


@st.composite
def completions(draw: st.DrawFn, tokens: dict[int, bytes]) -> tuple[list[int], int]:
    """(token ids, bytes before the answer line) of a text cut into tokens in any way that spells it.

    tokens: what each id adds to the text, single bytes among them.
    """
    word = st.sampled_from(
        ["Since", " 3 + 4", ".", "\u00e9", "\u2026", "\U0001f600", "\u200b", "\u4e2d", "**", " ", "\n"]
    )
    rationale = "".join(draw(st.lists(word | st.just("\nThe best answer is B"), max_size=8)))
    if rationale:
        rationale += "\n"
    marks = draw(st.sampled_from(["", "**", "\u201c", "\u2022 ", "\u200b", "- "]))
    line = marks + "The best answer is " + draw(st.sampled_from(["A", "(B)", "7.", "", "\uff21"]))
    rest = draw(st.sampled_from(["", "\n", "\nSince", " \U0001f600", "\n\n\u4e2d\n" * 20]))
    data, ids = (rationale + line + rest).encode(), []
    by_length = sorted((text, id_) for id_, text in tokens.items() if text)
    at = 0
    while at < len(data):
        fitting = [(text, id_) for text, id_ in by_length if data.startswith(text, at)]
        text, id_ = draw(st.sampled_from(fitting))
        ids.append(id_)
        at += len(text)
    return ids, len(rationale.encode())


def by_bytes(ids: list[int], spelt: dict[int, bytes], before: int) -> int:
    """The reference: tokens up to the first whose bytes end after the line began."""
    end = 0
    for count, id_ in enumerate(ids):
        end += len(spelt[id_])
        if end > before:
            return count
    raise AssertionError("the text has an answer line")


def check_against_bytes(tokenizer: Tokenizer, spelt: dict[int, bytes], examples: int = 150) -> None:
    @settings(max_examples=examples, deadline=None)
    @given(completions(spelt), st.booleans())
    def check(drawn: tuple[list[int], int], ended: bool) -> None:
        ids, before = drawn
        ids = [*ids, *sorted(tokenizer.eos_ids)[: int(ended)]]
        found = rationale_tokens(tokenizer, ids)
        assert found == by_bytes(ids, spelt, before)

    check()


MAKERS = {
    "toy": (lambda: Tokenizer.from_folder(TOY / "model"), byte_level),
    "crossing": (make_crossing, byte_level),
    "byte fallback": (make_byte_fallback, fallback_bytes),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_rationale_ends_where_the_bytes_say(name):
    make, spell = MAKERS[name]
    tokenizer = make()
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.backend.id_to_token(i) != "<unk>"]
    check_against_bytes(tokenizer, {i: spell(tokenizer, i) for i in ids})


@pytest.mark.real_data
def test_the_rationale_ends_where_the_bytes_say_in_a_real_vocabulary(tmp_path):
    data = os.environ.get("MINEM_REAL_DATA")
    if not data:
        pytest.skip("MINEM_REAL_DATA is not set: it names the folder with a real tokenizer")
    source = Path(data) / "qwen2.5-tokenizer"
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, tmp_path / name)
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    tokenizer = Tokenizer.from_folder(tmp_path)
    spelt = {i: byte_level(tokenizer, i) for i in range(tokenizer.vocab_size)}
    parts = (
        "The best answer is",
        "Since 3 + 4",
        "\u00e9\u2026\U0001f600\u200b\u4e2d**\n\n",
        "\u201c\u2022 - (B) 7.\uff21",
    )
    wanted = [text for text in spelt.values() if any(text in part.encode() for part in parts)]
    wanted += [b".\n", b"**\n", b"**\n\n", b" \n", b"\n\n\n"]
    check_against_bytes(tokenizer, {i: text for i, text in spelt.items() if text in wanted or len(text) < 2})


def test_the_line_is_the_last_that_the_strict_verdict_reads():
    text = "The best answer is A.\nNo:\u2026 \u2026\n\u200b**The best answer is B**\nSince I say so"
    start = answer_line(text)
    assert start is not None
    assert text[start:].startswith("\u200b**The best answer is B")
    assert answer_line("the answer is A") is None
    assert answer_line("Surely the best answer is A") is None  # the verdict does not read it either
    assert answer_line("The best answer is A") == 0


def test_a_run_on_rationales_alone_supervises_nothing_of_the_answer(tmp_path, monkeypatch):
    recorded = Recorded(monkeypatch)
    ok(train(tmp_path / "run", "--set", "mstep.answer_tokens=false"))
    _, tokenizer = load("toy")
    rows = rows_of(tmp_path / "run")
    assert len(recorded.examples) == len(rows) > 10
    for example, row in zip(recorded.examples, rows, strict=True):
        assert example.token_ids == row["token_ids"]
        trained, left = tokenizer.decode(example.targets), tokenizer.decode(row["token_ids"][example.supervised :])
        assert trained + left == row["text"]
        assert "best answer" not in trained
        assert left.startswith("\nThe best answer is ")  # one token of the toy's holds all of it
    result = read_journal(tmp_path / "run")["iter-01/mstep"]
    assert result["supervised_tokens"] == sum(example.supervised for example in recorded.examples)
    assert result["left_out"] == 0


def write_samples(folder: Path, *texts: str) -> Path:
    """Rows of the toy's first question with these texts, ended by EOS."""
    _, tokenizer = load("toy")
    question = load_task("toy", 24).train[0]
    eos = min(tokenizer.eos_ids)
    write_rows(
        folder / "samples.jsonl",
        [{"id": question.id, "text": text, "token_ids": [*tokenizer.encode(text, False), eos]} for text in texts],
    )
    return folder / "samples.jsonl"


def test_rationales_that_answer_at_once_are_left_out_counted_and_said(tmp_path, monkeypatch):
    recorded = Recorded(monkeypatch)
    samples = write_samples(
        tmp_path, "The best answer is 4", "So 4.\nThe best answer is 4", "Hm.\nThe best answer is 4"
    )
    alone = ["--set", "mstep.answer_tokens=false", "--set", "mstep.weights=question", "--set", "sampler.draws=all"]
    result = ok(train(tmp_path / "run", "--samples", samples, *alone, "--json"))
    assert "1 of 3 accepted rationales answer at once" in result.stderr
    assert json.loads(result.stdout)["left_out"] == 1
    # They count in the mean all the same: of an empty rationale the gradient is 0.
    assert [(example.weight, len(example.targets)) for example in recorded.examples] == [(1 / 3, 5), (1 / 3, 3)]
    assert "do not end in EOS" not in result.stderr


def test_where_nothing_is_left_a_guard_stops(tmp_path):
    samples = write_samples(tmp_path, "The best answer is 4")
    result = train(tmp_path / "run", "--samples", samples, "--set", "mstep.answer_tokens=false")
    assert result.exit_code == 4
    assert "every accepted row answers at once" in result.stderr


def any_answer(text, question):
    return question.gold


def test_a_text_without_an_answer_line_is_named(tmp_path):
    own = ["--verdict", f"{__name__}:any_answer", "--set", "mstep.answer_tokens=false"]
    samples = write_samples(tmp_path, "So 4.\nThe best answer is 4", "So 4.")
    result = train(tmp_path / "run", "--samples", samples, *own)
    assert result.exit_code == 2
    assert f"{samples}, row 2: the text has no line" in result.stderr
    assert "mstep.answer_tokens" in result.stderr
    result = train(tmp_path / "other", "--set", "sampler.filter=none", "--set", "mstep.answer_tokens=false")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "mstep.answer_tokens = false" in result.stderr
    assert "sampler.filter" in result.stderr


def test_unsupervised_tokens_change_neither_gradient_nor_divisor():
    """Training z alone is training an example that ends with z."""
    model, _ = load("toy")
    cut = [Example("a", [5, 6], [7, 8, 9, 10], 0.5, supervised=2), Example("b", [7, 5, 6], [9, 9, 8], supervised=1)]
    short = [replace(e, token_ids=e.targets, supervised=None) for e in cut]
    assert loss_divisor(cut, 1) == loss_divisor(short, 1) == 3
    mstep, found = MStep(model, MStepSection()), []
    for examples in (cut, short):
        model.zero_grad()
        totals = mstep.accumulate(examples, Step(0, ((0, 1),)), 3.0)
        found.append((totals, [p.grad.clone() for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    assert found[0][0].supervised == 3
    assert found[0][0].weight == 0.5 * 2 + 1
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
    with pytest.raises(UserError, match="supervised"):
        Example("a", [5], [6, 7], supervised=3)
