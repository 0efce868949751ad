"""Every setting of a run, on one page: type, default, bounds and meaning.

    minem config                                       # this page as TOML
    minem train CONFIG.toml --set mstep.lr=2e-5        # a file, then flags, then --set: later ones win

pydantic checks types and bounds, so that no module checks a setting of its own.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from minem.errors import UserError, one_of, shown
from minem.files import read_toml
from minem.plugins import check_origin
from minem.text import redact, visible

Few = Annotated[int, Field(ge=1, le=1_000)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
CountOrZero = Annotated[int, Field(ge=0, le=1_000_000)]
Rows = Annotated[int, Field(ge=1, le=10_000_000)]
Slots = Annotated[int, Field(ge=1, le=65_536)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Size = Annotated[float, Field(ge=0, le=1e6)]
Text = Annotated[str, Field(pattern=r"^[^\x00]+$")]
Place = Annotated[str, Field(pattern=r"^[^\x00]+$", max_length=1_000)]  # making nested folders is recursive
Texts = Annotated[list[Text], Field(max_length=16)]
# module:name of the user's own code
Reference = Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$")]
_TARGET = "(all|[qkvo]_proj|gate_proj|up_proj|down_proj)"
Targets = Annotated[str, Field(pattern=rf"^\s*{_TARGET}\s*(,\s*{_TARGET}\s*)*$")]
DEFAULT_BUDGETS = {"rsm": 8, "star": 2, "pps": 1}  # of a user's own sampler: 8


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class ModelSection(Section):
    id: Text = "toy"  # the embedded model, a Hugging Face folder, or a hub id
    revision: Text | None = None  # branch, tag or commit on the hub
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights at work; auto: bfloat16 if in hardware


class TaskSection(Section):
    name: Text = "toy"  # a built-in task, a folder or file of your own, or hub:NAME
    columns: Texts = []  # what columns of your own rows mean, like "question=problem" or "options=opa,opb"
    limit: Rows | None = None  # use at most N questions of each split
    prompt: Text | None = None  # a built-in prompt set, or a FILE.toml of your own; by default the task's
    shots: Literal["none", "proposal", "always"] = "none"  # worked examples: in no prompt, in the E-step, in all
    special_tokens: bool = False  # let texts like <|im_end|> in a question act as control tokens
    verdict: Reference | None = None  # module:function that replaces the answer check


class SamplerSection(Section):
    name: Literal["rsm", "star", "pps"] | Reference = "rsm"  # how rationales are drawn; or your own, module:Class
    budget: Count = Field(default_factory=lambda own: DEFAULT_BUDGETS.get(own.get("name"), 8))  # attempts per question
    draws: Literal["first", "all"] = "first"  # stop at the first accepted draw, or spend the budget and keep every one
    proposal: Literal["current", "base"] = "current"  # the model that hinted draws come from
    hint: Text = "forward"  # the wording that shows the answer: a hint of the prompt set
    filter: Literal["correct", "none"] = "correct"  # none: keep every draw, the control experiment
    drop_leaks: bool = False  # also reject hinted rationales that cite the hint
    min_rationale_tokens: CountOrZero = 0  # reject draws with fewer tokens before the answer line
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0  # of the draws
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0  # 0: off
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # 1: off
    min_p: Share = 0.0  # 0: off
    max_new_tokens: Count = 512  # a longer draw is truncated and rejected
    stop: Texts = []  # texts that end an answer, as base models need them


class MStepSection(Section):
    lr: Annotated[float, Field(ge=0, le=10)] = 1e-5  # peak learning rate, reached after the warm-up
    epochs: Few = 1  # passes over the accepted samples of an iteration
    batch_size: Count = 32  # examples per optimizer step
    pack_tokens: Count = 8192  # tokens per micro-batch: memory and speed, never the result
    warmup: Share = 0.1  # share of the steps
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up, towards 0 or constant
    weight_decay: Size = 0.0  # of matrices; norms and biases are never decayed
    beta1: Beta = 0.9  # AdamW
    beta2: Beta = 0.95  # AdamW
    clip: Size = 1.0  # largest gradient norm; 0: off
    checkpointing: Literal["auto", "off", "full"] = "auto"  # recompute activations; auto: of as few blocks as fit
    optimizer_state: Literal["reset", "keep"] = "reset"  # AdamW's moments at the start of a later iteration
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"  # several GPUs: replicated, sharded, or whichever fits
    lora_rank: Annotated[int, Field(ge=0, le=65_536)] = 0  # of the adapters; 0: full fine-tuning
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)] = 16.0  # adapters are scaled by lora_alpha / lora_rank
    lora_targets: Targets = "all"  # linear layers with adapters: all, or Hugging Face's names with commas
    weights: Literal["equal", "question", "importance"] = "equal"  # of accepted draws: 1, 1/n, or pi/q per question


class EvalSection(Section):
    max_new_tokens: Count = 512  # a longer answer is truncated and counts as wrong
    samples: Annotated[int, Field(ge=0, le=1_000)] = 1  # draws per question at temperature 1, beside the greedy answer
    diagnostics: CountOrZero = 32  # training questions with hinted draws; 0: off
    hinted_draws: Few = 4  # for each of them


class RunSection(Section):
    iterations: Annotated[int, Field(ge=0, le=10_000)] = 4  # of EM; 0: only evaluate the base model
    questions_per_iteration: Rows | None = None  # the next N of a shuffle that repeats; by default all
    seed: Seed = 0  # decides every random choice
    out: Place | None = None  # the run's folder; by default runs/TASK.SAMPLER+BUDGET.MODEL.sSEED
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where torch sees one
    init: Literal["previous", "base"] = "previous"  # what each M-step starts from; base as in STaR
    keep: Literal["last", "all"] = "last"  # model folders that stay on disk
    checkpoint_minutes: Size = 15.0  # between two checkpoints inside an M-step
    deterministic: bool = False  # on a GPU, bit-for-bit repeatable at some cost; a CPU always is
    slots: Slots | None = None  # sequences decoded at once; by default 96, on a GPU 256


class Config(Section):
    model: ModelSection = ModelSection()
    task: TaskSection = TaskSection()
    sampler: SamplerSection = SamplerSection()
    mstep: MStepSection = MStepSection()
    eval: EvalSection = EvalSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.mstep.weights != "equal" and self.sampler.draws != "all":
            raise ValueError(
                f'mstep.weights = "{self.mstep.weights}" weighs the accepted draws of a question against each other, '
                f'so it needs sampler.draws = "all", not "{self.sampler.draws}", which keeps one at most'
            )
        if self.mstep.optimizer_state == "keep" and self.run.init == "base":
            raise ValueError(
                'mstep.optimizer_state = "keep" continues from the last M-step, and run.init = "base" starts each from '
                "the base model: leave one of the two out"
            )
        return self

    def changed(self, keys: Mapping[str, Any]) -> "Config":
        """This config with {"section.key": value} in place, checked again."""
        values = self.model_dump()
        for key, value in keys.items():
            section, _, name = key.partition(".")
            values[section][name] = value
        return _validated({f"{s}.{k}": (v, "") for s, own in values.items() for k, v in own.items() if v is not None})


# The flags that are short for a key. They win over the file; a key given twice on one command line is an error.
FLAGS = {
    "model.id": "--model",
    "task.name": "--task",
    "task.limit": "--limit",
    "task.verdict": "--verdict",
    "task.prompt": "--prompt",
    "sampler.name": "--sampler",
    "sampler.budget": "--budget",
    "run.iterations": "--iterations",
    "run.seed": "--seed",
    "run.out": "--out",
    "run.device": "--device",
}
PATHS = ("model.id", "task.name", "task.prompt")  # keys that may be paths
CODE = ("sampler.name", "task.verdict")  # keys that may name a user's own code
TEXT = "a text that is valid Unicode and not empty, without NUL"
PATTERNS = {
    "run.out": f"{TEXT}, of at most 1,000 characters",
    "sampler.stop": 'a list of texts, like ["\\n\\n"]',
    "task.columns": 'a list of texts, like ["question=problem", "options=opa,opb"]',
    "task.verdict": "written as module:function",
    "mstep.lora_targets": '"all", or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj with commas',
}
SECTIONS: dict[str, type[Section]] = {name: type(field.default) for name, field in Config.model_fields.items()}
KEYS = {f"{section}.{key}": field for section, kind in SECTIONS.items() for key, field in kind.model_fields.items()}


def load_config(
    path: str | Path | None = None, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> Config:
    """A config from a TOML file, flags and `--set` overrides ("section.key=value"), the later ones winning.

    path: None starts from the embedded toy's own config as long as `model.id` stays "toy", else from the defaults.
    flags: {"sampler.budget": 8, ...}, keys of FLAGS; None: not given. UserError names what is wrong, and where.
    """
    return _validated(_compose(path, overrides, flags or {}))


def origins(
    path: str | Path | None = None, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Where each value of the same `load_config` was written, by key: "--budget", "my.toml"; defaults are left out."""
    return {key: origin for key, (_, origin) in _compose(path, overrides, flags or {}).items()}


def _compose(path: str | Path | None, overrides: Iterable[str], flags: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """{"section.key": (value, where it was written)} of the file and the command line."""
    given = _command_line(overrides, {key: value for key, value in flags.items() if value is not None})
    if path is None and given.get("model.id", ("toy",))[0] == "toy":
        path = Path(__file__).parent / "configs" / "toy.toml"
    values = {} if path is None else {key: (value, str(path)) for key, value in _file(Path(path))}
    return values | given


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    """("section.key", value) of a TOML file; relative paths in one of a run are relative to where the run began."""
    page = read_toml(path)
    began = re.search(r'^# Relative paths are relative to "([^"\\\n]+)"\.$', path.read_text("utf-8-sig"), re.MULTILINE)
    home = Path(began[1]) if began else Path()
    for section, values in page.items():
        if section not in SECTIONS:
            wanted = one_of(section, [f"[{name}]" for name in SECTIONS])
            raise UserError(f"{path}: there is no section [{section}]; it must be {wanted}")
        if not isinstance(values, dict):
            raise UserError(f"{path}: {section} must be a section, [{section}], not a value")
        for key, value in values.items():
            _check_key(f"{section}.{key}", str(path))
            # A bare word is the name of a built-in task or prompt set, and "toy" that of the built-in model.
            word = not isinstance(value, str) or value == "toy" or not (key == "id" or re.search(r"[./]", value))
            moves = f"{section}.{key}" in PATHS and home not in (Path(), Path.cwd()) and not word
            moved = moves and os.path.exists(home / value)
            yield f"{section}.{key}", str(home / value) if moved else value


def _command_line(overrides: Iterable[str], flags: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    given = {key: (value, FLAGS[key]) for key, value in flags.items()}
    for key, value in assignments(overrides, "--set"):
        if key in given:
            raise UserError(f"{key} is given twice on the command line, by {given[key][1]} and --set; give it once")
        given[key] = value, "--set"
    return given


def assignments(texts: Iterable[str], flag: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of texts like "mstep.lr=2e-5", values not checked yet. UserError names the flag they came by."""
    for one in texts:
        key, equals, text = (part.strip() for part in one.partition("="))
        if not equals or not text:
            raise UserError(f"{flag} {one}: write it as section.key=value, like mstep.lr=2e-5")
        _check_key(key, flag)
        try:
            parsed = tomllib.loads(f"value = {text}")
        except (ValueError, RecursionError):
            parsed = {}
        value = parsed["value"] if parsed.keys() == {"value"} else text
        # Texts need no quotes, even if they look like numbers: --set model.id=7
        yield key, text if _is_text(key) and not isinstance(value, str) else value


def _check_key(key: str, origin: str) -> None:
    if key in KEYS:
        return
    section, _, leaf = key.partition(".")
    near = sorted(k for k in KEYS if k.endswith("." + leaf)) or difflib.get_close_matches(key, KEYS, n=1)
    if near:
        advice = f"did you mean {' or '.join(near)}?"
    elif section in SECTIONS:
        advice = f"the keys of [{section}] are {', '.join(SECTIONS[section].model_fields)}"
    else:
        advice = f"a key is written as section.key, and the sections are {', '.join(SECTIONS)}"
    raise UserError(f"{origin}: there is no key {key}; {advice}")


def _validated(values: Mapping[str, tuple[Any, str]]) -> Config:
    """The config of {"section.key": (value, origin)}; UserError for the first that is wrong."""
    sections: dict[str, dict[str, Any]] = {}
    for key, (value, _) in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    try:
        config = Config.model_validate(sections)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"][:2]))
        if key not in values:  # a rule about two sections
            raise UserError(first["msg"].removeprefix("Value error, ")) from None
        value, origin = values[key]
        where = f"{origin}: " if origin else ""
        raise UserError(f"{where}{key} is {shown(value)}; it must be {_wanted(first, key)}") from None
    for key, (value, origin) in values.items():
        words = value if isinstance(value, list) else [value]
        if any(isinstance(w, str) and redact(w) != w and not os.path.exists(os.path.expanduser(w)) for w in words):
            place = "set the environment variable HF_TOKEN to a token, since runs store and publish their config"
            raise UserError(f"{origin and f'{origin}: '}{key} looks like it holds a secret; {place}")
    for key in CODE:
        value, origin = values.get(key, (None, ""))
        if isinstance(value, str) and ":" in value and origin not in ("", "--set", FLAGS[key]):
            check_origin(key, value, origin, FLAGS[key])
    return config


def _is_text(key: str) -> bool:
    return any(word in repr(KEYS[key].annotation) for word in ("str", "Literal")) and key not in (
        "sampler.stop",
        "task.columns",
    )


def _wanted(error: Any, key: str) -> str:
    """What a value must be, from pydantic's complaint about it."""
    if error["type"] == "literal_error":
        names = re.findall(r"'(\w+)'", error["ctx"]["expected"])
        found = error["input"] if isinstance(error["input"], str) else ""  # no name is near to a number
        return one_of(found, names, "or module:Class" if key == "sampler.name" else "")
    if _is_text(key) or key in PATTERNS:
        return PATTERNS.get(key, TEXT)
    return error["msg"].removeprefix("Input should be ")


def to_toml(config: Config, origins: Mapping[str, str] | None = None) -> str:
    """The config as TOML that `load_config` reads back to an equal one; `origins`, as of that function, as comments."""
    lines = []
    for section, values in config.model_dump(exclude_none=True).items():
        lines.append(f"[{section}]")
        for key, value in values.items():
            origin = (origins or {}).get(f"{section}.{key}")
            lines.append(f"{key} = {_toml_value(value)}" + (f"  # by {_toml_value(origin)}" if origin else ""))
        lines.append("")
    return "\n".join(lines)


def reference(config: Config) -> str:
    """The config as commented TOML, every key with its meaning, which is the comment beside it in this file."""
    source = Path(__file__).read_text(encoding="utf-8")
    lines = []
    for section, values in config.model_dump().items():
        body = source.partition(f"class {SECTIONS[section].__name__}(Section):\n")[2].partition("\n\n\n")[0]
        meaning = dict(re.findall(r"^    (\w+): .*  # (.*)$", body, re.MULTILINE))
        lines.append(f"[{section}]")
        for key, value in values.items():
            setting = f"# {key} =" if value is None else f"{key} = {_toml_value(value)}"
            lines.append(f"{setting:<32}  # {meaning[key]}")
        lines.append("")
    return "\n".join(lines)


def difference(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line per key that differs, like "sampler.budget: 8 -> 4"; {section: {key: value}}, None for not set."""
    before, after = ({f"{s}.{key}": v for s, values in c.items() for key, v in values.items()} for c in (old, new))
    pairs = {key: (before.get(key), after.get(key)) for key in after | before}
    return [f"{key}: {_toml_value(a)} -> {_toml_value(b)}" for key, (a, b) in pairs.items() if a != b]


def _toml_value(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):
        # TOML's basic strings are JSON's. What a terminal would obey is escaped, so the file is harmless to look at.
        return visible(json.dumps(value, ensure_ascii=False))
    return str(value).lower() if isinstance(value, bool) else repr(value)
