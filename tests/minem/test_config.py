"""The config: what is written is what is read back, flags win over files, and every mistake is one helpful sentence."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import tomllib
import typing
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minem
from minem.cli import main
from minem.config import FLAGS, SECTIONS, Config, difference, load_config, origins, to_toml
from minem.data.prompts import HINTS
from minem.data.tasks import TASKS
from minem.em.mstep import SCHEDULES, MStep
from minem.errors import UserError
from minem.model.decoder import Model
from minem.model.hf_config import ModelConfig

KEYS = [f"{section}.{name}" for section, kind in SECTIONS.items() for name in typing.get_type_hints(kind)]


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def test_the_fixed_keys_exist() -> None:
    assert list(SECTIONS) == ["model", "task", "sampler", "mstep", "eval", "run"]
    fixed = "model.id task.name task.limit sampler.name sampler.budget mstep.lr run.iterations run.seed"
    assert set(fixed.split()) <= set(KEYS)
    assert set(FLAGS) <= set(KEYS)


def test_the_toy_is_where_a_bare_command_starts(tmp_path: Path) -> None:
    toy = Path(minem.__file__).parent / "configs" / "toy.toml"
    assert load_config() == load_config(toy) != Config()
    assert load_config(flags={"model.id": "some/model"}).mstep == Config().mstep
    assert load_config(overrides=["model.id=some/model"]).mstep == Config().mstep
    assert load_config(write(tmp_path, "")) == Config()


def test_the_origin_of_each_value_is_known(tmp_path: Path) -> None:
    file = write(tmp_path, "[mstep]\nlr = 1e-3\nclip = 0.5\n[sampler]\nbudget = 3\n")
    given = (["mstep.clip=2"], {"sampler.budget": 4, "run.seed": None})
    assert origins(file, *given) == {"mstep.lr": str(file), "mstep.clip": "--set", "sampler.budget": "--budget"}
    assert origins(flags={"model.id": "some/model"}) == {"model.id": "--model"}


@given(st.text(min_size=1))
def test_an_origin_is_a_comment_whatever_a_path_may_hold(origin: str) -> None:
    origin = origin.encode("utf-8", "replace").decode()
    config = load_config(overrides=["sampler.budget=3", "task.name=a # b"])
    text = to_toml(config, {"sampler.budget": origin, "task.name": origin})
    assert tomllib.loads(text) == tomllib.loads(to_toml(config))
    assert text.count("  # by ") >= 2


CONFIGS = sorted((Path(minem.__file__).parent / "configs").glob("*.toml"))
# The shapes of the models in configs/, in the words of their config.json.
QWEN: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": True}
LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": True}
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN | dict(zip(SIZES, (24, 896, 14, 2, 4864), strict=True)),
    "Qwen/Qwen2.5-3B-Instruct": QWEN | dict(zip(SIZES, (36, 2048, 16, 2, 11008), strict=True)),
    "meta-llama/Llama-3.2-1B-Instruct": LLAMA | dict(zip(SIZES, (16, 2048, 32, 8, 8192), strict=True)),
    "meta-llama/Llama-3.2-3B-Instruct": LLAMA | dict(zip(SIZES, (28, 3072, 24, 8, 8192), strict=True)),
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA
    | {"tie_word_embeddings": False}
    | dict(zip(SIZES, (32, 4096, 32, 8, 14336), strict=True)),
}


def test_there_is_a_config_for_each_model_and_task_of_the_paper() -> None:
    there = {(config.model.id, config.task.name) for config in map(load_config, CONFIGS)}
    models = ("meta-llama/Llama-3.2-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct")
    assert set(product(models, ("arc-challenge", "mmlu", "openbookqa"))) <= there
    smaller = {"meta-llama/Llama-3.2-1B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", "toy"}
    assert smaller <= {model for model, _ in there}


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_a_shipped_config_opens_with_the_command_that_runs_it(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0] == f"# minem train configs/{path.name}"
    commands = [line.removeprefix("#").partition("  #")[0].split() for line in lines if line.startswith("#     minem ")]
    parsed = {}
    for _, name, *arguments in [lines[0][2:].split(), *commands]:
        if name in main.commands:  # raises a UsageError for a flag that is none
            parsed[name] = main.commands[name].make_context(name, list(arguments)).params
    config = load_config(path)
    assert parsed["train"]["config_file"] in (None, Path("configs") / path.name)
    if "eval" in parsed:
        assert (parsed["eval"]["model"], parsed["eval"]["task"]) == (config.model.id, config.task.name)
    for sampler, budget in {"rsm": 8, "star": 2, "pps": 1}.items():  # the file fixes no budget that suits one alone
        assert load_config(path, flags={"sampler.name": sampler}).sampler.budget == budget
    assert config.task.name in TASKS


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.name != "toy.toml"], ids=lambda path: path.name)
def test_the_memory_that_a_shipped_config_names_is_that_of_its_model(path: Path) -> None:
    config, text = load_config(path), " ".join(path.read_text().replace("#", " ").split())
    with torch.device("meta"):
        model = Model(ModelConfig.from_dict(SHAPES[config.model.id]))
    shape, parameters = model.config, sum(p.numel() for p in model.parameters())
    position = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim  # keys, values; bfloat16
    slots = config.run.slots
    assert slots is not None
    assert f"Download ({2 * parameters / 1e9:.1f} GB)" in text
    if config.mstep.lora_rank:
        mstep = MStep(model, config.mstep, base=Path())
        trained = mstep.trained_parameters
        total = (2 * parameters + 18 * trained) / 1e9
        assert f"computed and not measured: {total:.1f} GB, 2 bytes for each of" in text
        assert f"18 for each of {trained / 1e6:.1f} million in the adapters" in text
        assert f"Full fine-tuning: 18 bytes, {18 * parameters / 1e9:.1f} GB" in text
    else:
        assert f"computed and not measured: {18 * parameters / 1e9:.1f} GB, 18 bytes for each of" in text
    assert f"{parameters / 1e9:.2f} billion parameters" in text
    assert f"{slots * 1024 * position / 1e9:.1f} GB of KV cache for {slots} slots of 1,024 tokens" in text
    assert config.sampler.max_new_tokens == config.eval.max_new_tokens == 512
    gated = config.model.id.startswith("meta-llama/")
    assert (f"https://huggingface.co/{config.model.id}" in text and "HF_TOKEN" in text) == gated


@pytest.mark.real_data
def test_the_shapes_of_the_models_are_the_real_ones() -> None:
    root = os.environ.get("MINEM_REAL_DATA")
    if not root:
        pytest.skip("MINEM_REAL_DATA is not set: no real shapes to compare with")
    real = json.loads((Path(root) / "model-shapes.json").read_text())
    known = {repo: real[name] for repo in SHAPES if (name := repo.partition("/")[2]) in real}
    assert len(known) == 3
    for repo, shape in known.items():
        assert {key: shape[key] for key in SHAPES[repo]} == SHAPES[repo]


def test_flags_win_over_set_and_file(tmp_path: Path) -> None:
    path = write(tmp_path, '[sampler]\nname = "star"\nbudget = 5\n[mstep]\nlr = 1\n')
    assert load_config(path).sampler.budget == 5
    assert load_config(path).mstep.lr == 1.0
    config = load_config(path, ["mstep.lr=3e-4", "sampler.draws=all"], {"sampler.budget": 9, "run.seed": None})
    assert (config.sampler.name, config.sampler.budget, config.sampler.draws) == ("star", 9, "all")
    assert (config.mstep.lr, config.run.seed) == (3e-4, 0)


@pytest.mark.parametrize(("name", "budget"), [("rsm", 8), ("star", 2), ("pps", 1), ("my.module:Sampler", 8)])
def test_budgets_left_open_are_resolved(name: str, budget: int) -> None:
    config = load_config(flags={"sampler.name": name})
    assert config.sampler.budget == budget
    assert f"budget = {budget}\n" in to_toml(config)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.id=Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("model.id = 'quoted # not a comment'", "quoted # not a comment"),
        ("model.id=7", "7"),
        ("model.id=a=b", "a=b"),
        ("model.revision=2024-01-01", "2024-01-01"),
        ("model.id=x\nbudget=3", "x\nbudget=3"),
        ("sampler.drop_leaks=true", True),
        ("run.slots=16", 16),
        ("mstep.lr=1", 1.0),
        ("mstep.lr=2e-5", 2e-5),
    ],
)
def test_overrides_are_toml_or_bare_text(override: str, value: Any) -> None:
    section, _, key = override.partition("=")[0].strip().partition(".")
    read = getattr(getattr(load_config(overrides=[override]), section), key)
    assert read == value
    assert type(read) is type(value)


MISTAKES = {
    "unknown key": ("[sampler]\nbuget = 8", "there is no key sampler.buget; did you mean sampler.budget?"),
    "key of another section": ("[run]\nlr = 1e-3", "there is no key run.lr; did you mean mstep.lr?"),
    "key of two sections": (
        "[run]\nmax_new_tokens = 9",
        "no key run.max_new_tokens; did you mean eval.max_new_tokens or sampler.max_new_tokens?",
    ),
    "key like no other": ("[eval]\nzzzzzz = 1", "the keys of [eval] are max_new_tokens, samples"),
    "unknown section": ("[smapler]\nbudget = 8", "no section [smapler]; it must be one of [model], [task], [sampler]"),
    "near section": ("[samplers]\nbudget = 8", "(did you mean [sampler]?)"),
    "section as a value": ("run = 3", "run must be a section, [run], not a value"),
    "bare key": ("seed = 3", "no section [seed]"),
    "text for a number": ('[run]\nseed = "3"', 'run.seed is "3"; it must be a whole number'),
    "float for a whole number": ("[run]\niterations = 2.5", "run.iterations is 2.5; it must be a whole number"),
    "bool for a number": ("[run]\nseed = true", "run.seed is true; it must be a whole number"),
    "number for a bool": ("[sampler]\ndrop_leaks = 1", "sampler.drop_leaks is 1; it must be true or false"),
    "list": ("[task]\nname = ['toy']", "task.name is ['toy']; it must be a text"),
    "empty text": ('[task]\nname = ""', "valid Unicode and not empty"),
    "infinite": ("[mstep]\nlr = inf", "mstep.lr is inf; it must be a finite number"),
    "not a number": ("[sampler]\ntemperature = nan", "sampler.temperature is nan; it must be a finite number"),
    "zero temperature": ("[sampler]\ntemperature = 0", "sampler.temperature is 0.0; it must be between 0.001 and 1000"),
    "top_p": ("[sampler]\ntop_p = 1.5", "sampler.top_p is 1.5; it must be above 0 and at most 1"),
    "negative": ("[mstep]\nlr = -1", "mstep.lr is -1.0; it must be"),
    "no iterations": ("[run]\niterations = 0", "run.iterations is 0; it must be 1 or more"),
    "seed": ("[run]\nseed = 9223372036854775808", "it must be between 0 and 2^63 - 1"),
    "number of many digits": ("[run]\nseed = 0x1" + "0" * 4000, "it must be between 0 and 2^63 - 1"),
    "budget": ("[sampler]\nbudget = 0", "sampler.budget is 0; it must be 1 or more"),
    "limit": ("[task]\nlimit = 0", "task.limit is 0; it must be 1 or more"),
    "choice": (
        '[sampler]\ndraws = "frist"',
        'sampler.draws is "frist"; it must be one of first, all (did you mean first?)',
    ),
    "sampler": ('[sampler]\nname = "rms"', "must be one of rsm, star, pps or module:Class (did you mean rsm?)"),
    "hint": ('[sampler]\nhint = "forwards"', "(did you mean forward?)"),
    "verdict": ('[task]\nverdict = "my_check"', 'task.verdict is "my_check"; it must be written as module:function'),
    "device": ('[run]\ndevice = "gpu"', 'run.device is "gpu"; it must be one of auto, cpu, cuda'),
    "schedule": ('[mstep]\nschedule = "cos"', "mstep.schedule"),
    "LoRA target": ('[mstep]\nlora_targets = "q_proj, v_prj"', "or several with commas (did you mean v_proj?)"),
    "questions": ("[run]\nquestions_per_iteration = 0", "run.questions_per_iteration is 0; it must be 1 or more"),
    "not TOML": ("[run\nseed = 3", "is not valid TOML"),
    "twice": ("[run]\nseed = 3\nseed = 4", "is not valid TOML"),
    "deep": ("[run]\nseed = " + "[" * 10_000, "is not valid TOML"),
    "huge": ("#" * (2**20 + 1), "that is the limit"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_file_is_one_sentence_with_the_files_name(tmp_path: Path, case: str) -> None:
    text, expected = MISTAKES[case]
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert expected in message
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 600 + len(str(path))


@pytest.mark.parametrize(
    ("overrides", "flags", "expected"),
    [
        (["run.seed"], {}, "--set run.seed: write it as section.key=value"),
        (["run.seed="], {}, "write it as section.key=value"),
        (["seed=3"], {}, "--set: there is no key seed; did you mean run.seed?"),
        (["zzz=3"], {}, "the sections are model, task"),
        (["mstep.lrr=3"], {}, "did you mean mstep.lr?"),
        (["run.seed=three"], {}, '--set: run.seed is "three"; it must be a whole number'),
        (["run.seed=3"], {"run.seed": 4}, "run.seed is given twice on the command line, by --seed and --set"),
        (["run.seed=3", "run.seed=4"], {}, "given twice on the command line, by --set and --set"),
        ([], {"sampler.budget": 0}, "--budget: sampler.budget is 0; it must be 1 or more"),
        ([], {"sampler.name": "srar"}, '--sampler: sampler.name is "srar"; it must be'),
        ([], {"model.id": "half a pair \ud83d"}, "--model: model.id is"),
    ],
)
def test_a_mistake_on_the_command_line_names_the_flag(
    overrides: list[str], flags: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, overrides, flags)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_file_that_is_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"^config .* cannot be read: "):
        load_config(tmp_path / name)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not valid TOML"):
        load_config(tmp_path / "config.toml")


def texts() -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)


def floats(low: float, high: float, **bounds: bool) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, **bounds)


# Values that each key may take; the rest follows from the types.
ALLOWED: dict[str, st.SearchStrategy[Any]] = {
    "task.verdict": st.sampled_from(["minem.a:b", "minem.data.verdict:number"]),
    "sampler.name": st.sampled_from(["rsm", "star", "pps", "minem.mine:Sampler"]),
    "sampler.hint": st.sampled_from(sorted(HINTS)),
    "sampler.temperature": floats(1e-3, 1e3),
    "sampler.top_k": st.integers(0, 2**31 - 1),
    "sampler.top_p": floats(0, 1, exclude_min=True),
    "sampler.min_p": floats(0, 1),
    "mstep.schedule": st.sampled_from(SCHEDULES),
    "mstep.warmup": floats(0, 1),
    "mstep.beta1": floats(0, 1, exclude_max=True),
    "mstep.beta2": floats(0, 1, exclude_max=True),
    "mstep.lora_alpha": floats(0, 1e300, exclude_min=True),
    "mstep.lora_targets": st.sampled_from(["all", "q_proj", "up_proj, q_proj"]),
    "run.seed": st.integers(0, 2**63 - 1),
    "run.slots": st.none() | st.integers(1, 65_536),
}
BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    str: texts(),
    int: st.integers(1, 2**62),
    float: floats(0, 1e300),
    bool: st.booleans(),
    type(None): st.none(),
}


def values(key: str, hint: Any) -> st.SearchStrategy[Any]:
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    alternatives = typing.get_args(hint) or (hint,)
    free = [BY_TYPE[kind] for kind in alternatives if not (key in ALLOWED and kind is not type(None))]
    return st.one_of(*free, *([ALLOWED[key]] if key in ALLOWED else []))


@st.composite
def configs(draw: st.DrawFn) -> Config:
    drawn = {
        section: kind(**{n: draw(values(f"{section}.{n}", h)) for n, h in typing.get_type_hints(kind).items()})
        for section, kind in SECTIONS.items()
    }
    if drawn["mstep"].weights != "equal":
        drawn["sampler"] = dataclasses.replace(drawn["sampler"], draws="all")
    if not drawn["mstep"].answer_tokens:
        drawn["sampler"] = dataclasses.replace(drawn["sampler"], filter="correct")
    if drawn["run"].init == "base":
        drawn["mstep"] = dataclasses.replace(drawn["mstep"], optimizer_state="reset")
    return Config(**drawn)


@settings(max_examples=300, deadline=None)
@given(config=configs())
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8", newline="")
    assert load_config(path) == config
    assert difference(config.model_dump(), asdict(load_config(path))) == []


@settings(max_examples=300, deadline=None)
@given(old=configs(), new=configs())
def test_the_difference_names_exactly_the_keys_that_differ(old: Config, new: Config) -> None:
    lines = difference(asdict(old), asdict(new))
    flat = [
        {f"{s}.{k}": v for s, section in dataclasses.asdict(c).items() for k, v in section.items()} for c in (old, new)
    ]
    assert [line.partition(": ")[0] for line in lines] == [key for key in KEYS if flat[0][key] != flat[1][key]]
    assert all("\n" not in line for line in lines)


def test_the_difference_reads_well() -> None:
    old = load_config(flags={"task.limit": 64})
    new = load_config(flags={"sampler.budget": 4, "sampler.name": "star"})
    assert difference(asdict(old), asdict(new)) == [
        "task.limit: 64 -> not set",
        'sampler.name: "rsm" -> "star"',
        "sampler.budget: 8 -> 4",
    ]


TOML_VALUES = st.recursive(
    st.one_of(st.integers(), st.booleans(), st.floats(), st.text(st.characters(exclude_categories=["Cs"]), max_size=9)),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


def as_toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(c):08x}" for c in value) + '"'
    return str(value).lower()


@settings(max_examples=1000, deadline=None)
@given(key=st.sampled_from(KEYS), value=TOML_VALUES)
def test_any_value_is_taken_or_refused_in_one_sentence(key: str, value: Any) -> None:
    text = as_toml(value)
    assert repr(tomllib.loads(f"v = {text}")["v"]) == repr(value)
    section, _, name = key.partition(".")
    refusal = None
    try:
        taken = getattr(getattr(load_config(overrides=[f"{key}={text}"]), section), name)
    except UserError as error:
        refusal = str(error)
    if refusal is None:
        assert taken in (value, text)
    else:
        assert key in refusal
        assert "\n" not in refusal
        assert len(refusal) < 600


@settings(max_examples=1000, deadline=None)
@given(text=st.text(max_size=60))
def test_any_file_is_read_or_refused_in_one_sentence(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    refusal = None
    try:
        load_config(path)
    except UserError as error:
        refusal = str(error)
    assert refusal is None or (str(path) in refusal and "\n" not in refusal)


def keys_read(source: str) -> set[str]:
    """The "section.key" that some Python reads as `anything.section.key` or `section.key`, and bare `.key` as "key"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            section = (
                owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            )
            found |= {f"{section}.{node.attr}"}
            found |= {node.attr}
    return found


def test_every_key_is_read() -> None:
    """No key is there for show: each is read as config.section.key, those of [mstep] inside minem/em/mstep.py."""
    root = Path(minem.__file__).parent
    read: set[str] = set()
    for path in root.glob("*.py"):
        if path.name != "config.py":
            read |= keys_read(path.read_text())
    in_mstep = keys_read((root / "mstep.py").read_text())
    unread = [k for k in KEYS if k not in read and not (k.startswith("mstep.") and k.partition(".")[2] in in_mstep)]
    assert unread == []


def test_a_file_may_name_code_of_this_folder_and_the_command_line_any(tmp_path: Path, monkeypatch: Any) -> None:
    """A stranger's config with shutil:rmtree for an answer check would delete whatever folder a model names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "inner.py").write_text("")
    for name in ("mine:check", "package.inner:check", "minem.data.verdict:number"):
        assert load_config(write(tmp_path, f'[task]\nverdict = "{name}"')).task.verdict == name
    for name in ("shutil:rmtree", "package.other:check", "hypothesis:given", "os.path:exists"):
        file = write(tmp_path, f'[task]\nverdict = "{name}"')
        with pytest.raises(UserError, match=rf"no code of this folder.* give --verdict {name} on the command line"):
            load_config(file)
        assert load_config(file, flags={"task.verdict": name}).task.verdict == name
        assert load_config(file, [f"task.verdict={name}"]).task.verdict == name
