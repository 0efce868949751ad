"""The config: what is written is what is read back, flags win over files, and every mistake is one helpful sentence."""

from __future__ import annotations

import ast
import json
import os
import tomllib
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import minem
from minem.cli import main
from minem.config import (
    DEFAULT_BUDGETS,
    FLAGS,
    KEYS,
    PATTERNS,
    SECTIONS,
    Config,
    SamplerSection,
    difference,
    load_config,
    origins,
    to_toml,
)
from minem.data.tasks import TASKS
from minem.em.mstep import MStep
from minem.em.samplers import SAMPLERS
from minem.errors import UserError
from minem.model.decoder import Model
from minem.model.hf_config import ModelConfig
from minem.model.lora import TARGETS

ROOT = Path(minem.__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
# What pydantic knows of each key: type, bounds, choices.
SCHEMAS = {
    f"{section}.{key}": [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    for section, kind in SECTIONS.items()
    for key, schema in kind.model_json_schema()["properties"].items()
}
NUMBERS = {key: kinds[0] for key, kinds in SCHEMAS.items() if kinds[0]["type"] in ("integer", "number")}


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def value_of(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def test_the_fixed_keys_exist() -> None:
    assert list(SECTIONS) == ["model", "task", "sampler", "mstep", "eval", "run"]
    fixed = "model.id task.name task.limit sampler.name sampler.budget mstep.lr run.iterations run.seed"
    assert {*fixed.split(), *FLAGS, *PATTERNS} <= set(KEYS)


def test_the_lists_of_the_page_are_what_the_code_knows() -> None:
    literal, _ = get_args(SamplerSection.model_fields["name"].annotation)
    assert get_args(literal) == tuple(SAMPLERS) == tuple(DEFAULT_BUDGETS)
    for name in ("all", *TARGETS, " , ".join(TARGETS)):
        assert load_config(overrides=[f"mstep.lora_targets={name}"]).mstep.lora_targets == name
    assert all(name in PATTERNS["mstep.lora_targets"] for name in TARGETS)


def test_the_toy_is_where_a_bare_command_starts(tmp_path: Path) -> None:
    assert load_config() == load_config(ROOT / "configs" / "toy.toml") != Config()
    assert load_config(flags={"model.id": "some/model"}).mstep == Config().mstep
    assert load_config(overrides=["model.id=some/model"]).mstep == Config().mstep
    assert load_config(write(tmp_path, "")) == Config()
    assert load_config(write(tmp_path, "\ufeff[run]\nseed = 3\n")).run.seed == 3  # as Windows writes files


def test_flags_win_over_the_file_and_the_origin_of_each_value_is_known(tmp_path: Path) -> None:
    file = write(tmp_path, '[sampler]\nname = "star"\nbudget = 5\n[mstep]\nlr = 1\nclip = 0.5\n')
    assert (load_config(file).sampler.budget, load_config(file).mstep.lr) == (5, 1.0)
    given = (["mstep.clip=2", "sampler.draws=all"], {"sampler.budget": 9, "run.seed": None})
    config = load_config(file, *given)
    assert (config.sampler.name, config.sampler.budget, config.sampler.draws) == ("star", 9, "all")
    assert (config.mstep.lr, config.mstep.clip, config.run.seed) == (1.0, 2.0, 0)
    assert origins(file, *given) == {
        "sampler.name": str(file),
        "mstep.lr": str(file),
        "mstep.clip": "--set",
        "sampler.draws": "--set",
        "sampler.budget": "--budget",
    }
    assert origins(flags={"model.id": "some/model"}) == {"model.id": "--model"}


@settings(max_examples=40)
@given(st.text(min_size=1))
def test_an_origin_is_a_comment_for_any_path(origin: str) -> None:
    origin = origin.encode("utf-8", "replace").decode()
    config = load_config(overrides=["sampler.budget=3", "task.name=a # b"])
    text = to_toml(config, {"sampler.budget": origin, "task.name": origin})
    assert tomllib.loads(text) == tomllib.loads(to_toml(config))
    assert text.count("  # by ") >= 2


@pytest.mark.parametrize(("name", "budget"), [*DEFAULT_BUDGETS.items(), ("my.module:Sampler", 8)])
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
    read = value_of(load_config(overrides=[override]), override.partition("=")[0].strip())
    assert read == value
    assert type(read) is type(value)


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("key", NUMBERS)
def test_each_number_has_both_bounds_and_is_refused_beyond_them(key: str) -> None:
    """A count without an upper bound, like eval.samples = 10^12, would be taken and run for ever."""
    bounds, whole = NUMBERS[key], NUMBERS[key]["type"] == "integer"
    low, high = (bounds.get(name, bounds.get(f"exclusive{name.title()}")) for name in ("minimum", "maximum"))
    beyond = [low - 1, high + 1 if whole else high * 1.001, 10**20]
    beyond += [bounds[name] for name in ("exclusiveMinimum", "exclusiveMaximum") if name in bounds]
    for value in beyond:
        with pytest.raises(UserError, match=rf"^--set: {key} is .*; it must be (less|greater) than ") as caught:
            load_config(overrides=[f"{key}={value}"])
        assert "\n" not in str(caught.value)
    for name in ("minimum", "maximum"):
        if name in bounds:
            assert value_of(load_config(overrides=[f"{key}={bounds[name]}"]), key) == bounds[name]
    for value in ("true", '"x"', "[1]", "{}", "nan" if not whole else "1.5"):
        with pytest.raises(UserError, match=rf"^--set: {key} is .*; it must be a (valid|finite) "):
            load_config(overrides=[f"{key}={value}"])


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
    "number for a bool": ("[sampler]\ndrop_leaks = 1", "sampler.drop_leaks is 1; it must be a valid boolean"),
    "list": ("[task]\nname = ['toy']", "task.name is ['toy']; it must be a text"),
    "empty text": ('[task]\nname = ""', "valid Unicode and not empty"),
    "NUL": ('[task]\nname = "a\\u0000"', "without NUL"),
    "choice": (
        '[sampler]\ndraws = "frist"',
        'sampler.draws is "frist"; it must be one of first, all (did you mean first?)',
    ),
    "sampler": ('[sampler]\nname = "rms"', "must be one of rsm, star, pps or module:Class (did you mean rsm?)"),
    "number for a choice": (
        "[sampler]\nproposal = 0x1" + "0" * 4000,
        "proposal is too long to show; it must be one of current",
    ),
    "verdict": ('[task]\nverdict = "my_check"', 'task.verdict is "my_check"; it must be written as module:function'),
    "LoRA target": ('[mstep]\nlora_targets = "q_proj, v_prj"', 'it must be "all", or some of q_proj'),
    "number of many digits": ("[run]\nseed = 0x1" + "0" * 4000, "run.seed is too long to show; it must be less than"),
    "not TOML": ("[run\nseed = 3", "is not valid TOML"),
    "twice": ("[run]\nseed = 3\nseed = 4", "is not valid TOML"),
    "huge": ("#" * (2**20 + 1), "that is the limit"),
    "bytes": (b"\xff\xfe", "is not valid TOML"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_file_is_one_sentence_with_the_files_name(tmp_path: Path, case: str) -> None:
    text, expected = MISTAKES[case]
    path = tmp_path / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert expected in message
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 600 + len(str(path))


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_file_that_is_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r" cannot be read: "):
        load_config(tmp_path / name)


@pytest.mark.parametrize(
    ("overrides", "flags", "expected"),
    [
        (["run.seed"], {}, "--set run.seed: write it as section.key=value"),
        (["run.seed="], {}, "write it as section.key=value"),
        (["seed=3"], {}, "--set: there is no key seed; did you mean run.seed?"),
        (["zzz=3"], {}, "the sections are model, task"),
        (["mstep.lrr=3"], {}, "did you mean mstep.lr?"),
        (["run.seed=three"], {}, '--set: run.seed is "three"; it must be a valid integer'),
        (["run.seed=3"], {"run.seed": 4}, "run.seed is given twice on the command line, by --seed and --set"),
        (["run.seed=3", "run.seed=4"], {}, "given twice on the command line, by --set and --set"),
        ([], {"sampler.budget": 0}, "--budget: sampler.budget is 0; it must be greater than or equal to 1"),
        ([], {"sampler.name": "srar"}, '--sampler: sampler.name is "srar"; it must be one of rsm, star, pps'),
        ([], {"model.id": "half a pair \ud83d"}, "--model: model.id is"),
        (["mstep.weights=question"], {}, 'it needs sampler.draws = "all", not "first"'),
        (["mstep.optimizer_state=keep", "run.init=base"], {}, "leave one of the two out"),
    ],
)
def test_a_mistake_on_the_command_line_names_the_flag(
    overrides: list[str], flags: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, overrides, flags)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_may_name_code_of_this_folder_and_the_command_line_any(tmp_path: Path, monkeypatch: Any) -> None:
    """A stranger's config with shutil:rmtree for an answer check would delete the folders that a model names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "inner.py").write_text("")
    own = (f"minem.data.verdict:{name}" for name in ("strict", "flexible", "number"))
    for name in ("mine:check", "package.inner:check", *own):
        assert load_config(write(tmp_path, f'[task]\nverdict = "{name}"')).task.verdict == name
    (tmp_path / "minem.py").write_text("")
    others = ("minem.files:write_rows", "minem.data.verdict:load_verdict", "minem:load")
    for name in ("shutil:rmtree", "package.other:check", "hypothesis:given", "os.path:exists", *others):
        file = write(tmp_path, f'[task]\nverdict = "{name}"')
        with pytest.raises(UserError, match=rf"no code of this folder.* give --verdict {name} on the command line"):
            load_config(file)
        assert load_config(file, flags={"task.verdict": name}).task.verdict == name
        assert load_config(file, [f"task.verdict={name}"]).task.verdict == name
    for name in ("minem.em.samplers:RejectionSampling", "minem.data.verdict:strict"):
        with pytest.raises(UserError, match=f"give --sampler {name} on the command line"):
            load_config(write(tmp_path, f'[sampler]\nname = "{name}"'))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.revision", "hf_abcdefghijklmnopqrst"),
        ("model.id", "https://me:password@hub.co/a"),
        ("sampler.stop", '["a", "hf_abcdefghijklmnopqrst"]'),
        ("run.out", "runs/of-the-environment-1234"),
    ],
)
def test_a_secret_is_refused_before_it_is_stored(key: str, value: str, tmp_path: Path, monkeypatch: Any) -> None:
    """run.json, config.toml and the report hold the config, and are published with the model."""
    monkeypatch.setenv("MY_API_KEY", "of-the-environment-1234")
    with pytest.raises(UserError, match=f"^--set: {key} looks like it holds a secret; .* HF_TOKEN ") as caught:
        load_config(overrides=[f"{key}={value}"])
    assert not any(word in str(caught.value) for word in ("abcdefg", "password", "of-the-environment"))
    section, _, name = key.partition(".")
    path = write(tmp_path, f"[{section}]\n{name} = {value if value[0] == '[' else json.dumps(value)}")
    with pytest.raises(UserError, match=rf"config.toml: {key} looks like"):
        load_config(path)
    (tmp_path / "hf_checkpoints").mkdir()
    assert load_config(overrides=[f"model.id={tmp_path}/hf_checkpoints"]).model.id == f"{tmp_path}/hf_checkpoints"


# --------------------------------------------------------------------------------------------- written and read again


def texts() -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)


CODE = {
    "sampler.name": "tests.conftest:Sampler",
    "task.verdict": "minem.data.verdict:number",
    "mstep.lora_targets": "up_proj, q_proj",
}


def values(key: str) -> st.SearchStrategy[Any]:
    """What a key may take, from its schema."""
    kinds = []
    for schema in SCHEMAS[key]:
        low, high = schema.get("minimum"), schema.get("maximum")
        if "enum" in schema:
            kinds.append(st.sampled_from(schema["enum"]))
        elif schema["type"] == "integer":
            kinds.append(st.integers(low, high if high is not None else schema["exclusiveMaximum"] - 1))
        elif schema["type"] == "number":
            below, above = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
            bounds = (low if below is None else below, high if above is None else above)
            kinds.append(st.floats(*bounds, exclude_min=below is not None, exclude_max=above is not None))
        elif schema["type"] == "array":
            kinds.append(st.lists(texts(), max_size=3))
        elif schema["type"] == "boolean":
            kinds.append(st.booleans())
        else:
            kinds.append(st.just(CODE[key]) if key in CODE else texts())
    return st.one_of(*kinds, *([st.none()] if KEYS[key].default is None else []))


@st.composite
def configs(draw: st.DrawFn) -> Config:
    keys = {key: draw(values(key)) for key in KEYS}
    if keys["mstep.weights"] != "equal":
        keys["sampler.draws"] = "all"
    if keys["run.init"] == "base":
        keys["mstep.optimizer_state"] = "reset"
    return Config().changed(keys)


@settings(max_examples=50, deadline=None)
@given(old=configs(), new=configs())
def test_what_is_written_is_read_back_and_the_difference_names_exactly_what_differs(
    tmp_path_factory: pytest.TempPathFactory, old: Config, new: Config
) -> None:
    path = tmp_path_factory.getbasetemp() / "config.toml"
    path.write_text(to_toml(old), encoding="utf-8", newline="")
    assert load_config(path) == old
    lines = difference(old.model_dump(), new.model_dump())
    assert all("\n" not in line for line in lines)
    differing = {key for key in KEYS if value_of(old, key) != value_of(new, key)}
    assert {line.partition(": ")[0] for line in lines} == differing
    assert len(lines) == len(differing)


def test_the_difference_reads_well() -> None:
    old = load_config(flags={"task.limit": 64})
    new = load_config(flags={"sampler.budget": 4, "sampler.name": "star"})
    assert difference(old.model_dump(), new.model_dump()) == [
        "task.limit: 64 -> not set",
        'sampler.name: "rsm" -> "star"',
        "sampler.budget: 8 -> 4",
    ]


def test_the_reference_has_every_key_with_its_meaning_and_is_read_back(tmp_path: Path) -> None:
    for keys in ([], ["mstep.lr=3e-4", 'task.name=a # "b"', "run.slots=4", "model.id=some/model"]):
        printed = CliRunner().invoke(main, ["config", *(word for one in keys for word in ("--set", one))])
        assert printed.exit_code == 0, printed.output
        assert load_config(write(tmp_path, printed.stdout)) == load_config(overrides=keys)
        section = ""
        meanings = {}
        for line in filter(None, printed.stdout.splitlines()):
            if line.startswith("["):
                section = line.strip("[]")
            else:
                key, _, rest = line.removeprefix("# ").partition(" =")
                meanings[f"{section}.{key}"] = rest.rpartition("  # ")[2]
        assert list(meanings) == list(KEYS)
        assert all(meanings.values())
    assert meanings["run.slots"] == "sequences decoded at once; by default 96, on a GPU 256"


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


@settings(max_examples=200, deadline=None)
@given(key=st.sampled_from(list(KEYS)), value=TOML_VALUES)
def test_any_value_is_taken_or_refused_in_one_sentence(key: str, value: Any) -> None:
    text = as_toml(value)
    assert repr(tomllib.loads(f"v = {text}")["v"]) == repr(value)
    refusal = None
    try:
        taken = value_of(load_config(overrides=[f"{key}={text}"]), key)
    except UserError as error:
        refusal = str(error)
    if refusal is None:
        assert taken in (value, text)
    else:
        assert key in refusal
        assert "\n" not in refusal
        assert len(refusal) < 600


def keys_read(source: str) -> set[str]:
    """The keys that a file reads: as config.section.key, or from the section's own class if it names that class."""
    own = [section for section, kind in SECTIONS.items() if kind.__name__ in source]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            found |= {f"{section}.{node.attr}" for section in [name, *(own if name in ("section", "config") else [])]}
        elif isinstance(node, ast.Constant) and "getattr(" in source:
            found |= {f"{section}.{node.value}" for section in own}
    return found


def test_every_key_is_read() -> None:
    """No key is there for show."""
    folders = (ROOT / "minem", ROOT / "data")
    sources = [path for folder in folders for path in folder.rglob("*.py") if path.name != "config.py"]
    assert len(sources) > 40
    assert KEYS.keys() - set().union(*(keys_read(path.read_text()) for path in sources)) == set()


# ----------------------------------------------------------------------------------------------------- shipped configs

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
    for sampler, budget in DEFAULT_BUDGETS.items():  # the file fixes no budget that suits one alone
        assert load_config(path, flags={"sampler.name": sampler}).sampler.budget == budget
    assert config.task.name in TASKS


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """Those of the shipped configs, without weights."""
    with torch.device("meta"):
        return {name: Model(ModelConfig.from_dict(shape)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if p.name.startswith(("llama", "qwen"))], ids=lambda path: path.name
)
def test_the_memory_that_a_shipped_config_names_is_that_of_its_model(path: Path, models: dict[str, Model]) -> None:
    config, text = load_config(path), " ".join(path.read_text().replace("#", " ").split())
    model = models[config.model.id]
    shape, parameters = model.config, sum(p.numel() for p in model.parameters())
    position = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim  # keys, values; bfloat16
    slots = config.run.slots
    assert slots is not None
    assert f"Download ({2 * parameters / 1e9:.1f} GB)" in text
    if config.mstep.lora_rank:
        trained = MStep(model, config.mstep, base=Path()).trained_parameters
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
