"""The config of a run: six small sections, read from TOML and flags, and checked before anything starts.

    minem train CONFIG.toml --set mstep.lr=2e-5 --set sampler.draws=all --dry-run

Every key has a default, so a config names only what differs; `configs/` holds commented examples. A mistake is one
sentence that says where it stands (file or flag), which key it is, what would be right, and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from minem.data.prompts import DEFAULT_HINT, HINTS
from minem.errors import UserError
from minem.mstep import MStepConfig
from minem.samplers import SAMPLERS, default_budget

SIZE_LIMIT = 1 << 20  # bytes of a config file
# The flags that are short for a key. They win over the file; saying a key twice on one command line is an error.
FLAGS = {
    "model.id": "--model",
    "task.name": "--task",
    "task.limit": "--limit",
    "task.verdict": "--verdict",
    "sampler.name": "--sampler",
    "sampler.budget": "--budget",
    "run.iterations": "--iterations",
    "run.seed": "--seed",
    "run.out": "--out",
    "run.device": "--device",
}


@dataclass(frozen=True)
class ModelSection:
    id: str = "toy"  # the embedded model, a Hugging Face folder, or a hub id
    revision: str | None = None  # of a hub id: branch, tag or commit
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # working weights: bfloat16 on a GPU, float32 on the CPU


@dataclass(frozen=True)
class TaskSection:
    name: str = "toy"  # toy, arc-challenge, arc-easy, openbookqa, mmlu, or a folder or file of your own
    limit: int | None = None  # at most so many questions of each split, train and test alike
    verdict: str | None = None  # module:function that replaces the answer check

    def __post_init__(self) -> None:
        _require("task", self, limit=(self.limit is None or self.limit >= 1, "1 or more"))
        if self.verdict is not None:
            _require("task", self, verdict=(_is_reference(self.verdict), "written as module:function"))


@dataclass(frozen=True)
class SamplerSection:
    name: str = "rsm"  # rsm, star, pps, or module:Class
    budget: int | None = None  # most attempts per question and iteration; by default rsm 8, star 2, pps 1
    draws: Literal["first", "all"] = "first"  # stop at the first accepted draw, or spend the budget and keep them all
    proposal: Literal["current", "base"] = "current"  # the model that hinted draws come from
    hint: str = DEFAULT_HINT  # the wording that shows the answer, a name of minem.data.prompts.HINTS
    filter: Literal["correct", "none"] = "correct"  # "none" keeps every draw: the control experiment
    drop_leaks: bool = False  # also reject hinted rationales that cite the hint
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.budget is None:  # resolved here, so that a run's record shows the number
            object.__setattr__(self, "budget", default_budget(self.name))
        _require(
            "sampler",
            self,
            name=(self.name in SAMPLERS or _is_reference(self.name), _one_of(self.name, SAMPLERS, "or module:Class")),
            budget=(typing.cast(int, self.budget) >= 1, "1 or more"),
            hint=(self.hint in HINTS, _one_of(self.hint, HINTS)),
            temperature=(self.temperature > 0, "above 0: draws that never vary cannot be sampled from"),
            top_k=(self.top_k >= 0, "0 (off) or more"),
            top_p=(0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            min_p=(0 <= self.min_p <= 1, "between 0 (off) and 1"),
            max_new_tokens=(self.max_new_tokens >= 1, "1 or more"),
        )


@dataclass(frozen=True)
class EvalSection:
    max_new_tokens: int = 1024
    samples: int = 1  # draws per question at temperature 1, beside the greedy answer; 0: greedy alone

    def __post_init__(self) -> None:
        _require(
            "eval",
            self,
            max_new_tokens=(self.max_new_tokens >= 1, "1 or more"),
            samples=(self.samples >= 0, "0 or more"),
        )


@dataclass(frozen=True)
class RunSection:
    iterations: int = 4
    seed: int = 0
    out: str | None = None  # the run's folder; by default runs/TASK.SAMPLER+BUDGET.MODEL.sSEED
    device: Literal["auto", "cpu", "cuda"] = "auto"
    init: Literal["previous", "base"] = "previous"  # what each M-step starts from; "base" as in STaR
    keep: Literal["last", "all"] = "last"  # model folders that stay on disk
    slots: int | None = None  # sequences generated at once; by default what memory allows

    def __post_init__(self) -> None:
        _require(
            "run",
            self,
            iterations=(self.iterations >= 1, "1 or more"),
            seed=(0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
            slots=(self.slots is None or self.slots >= 1, "1 or more"),
        )


@dataclass(frozen=True)
class Config:
    """What a run is. Two runs with equal configs, `run.out` apart, are the same experiment."""

    model: ModelSection = field(default_factory=ModelSection)
    task: TaskSection = field(default_factory=TaskSection)
    sampler: SamplerSection = field(default_factory=SamplerSection)
    mstep: MStepConfig = field(default_factory=MStepConfig)
    eval: EvalSection = field(default_factory=EvalSection)
    run: RunSection = field(default_factory=RunSection)


SECTIONS: dict[str, type] = {f.name: typing.cast(type, f.default_factory) for f in dataclasses.fields(Config)}


def load_config(
    path: str | Path | None = None, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> Config:
    """Compose a config from a TOML file, `--set` overrides ("section.key=value") and flags, the later ones winning.

    path: None starts from the embedded toy's own config as long as `model.id` stays "toy", else from the defaults.
    flags: {"sampler.budget": 8, ...}, the keys those of FLAGS; None means that the flag was not given.

    Raises UserError for a file that cannot be read, unknown sections and keys, and values of a wrong type or range.
    """
    given = _command_line(overrides, {key: value for key, value in (flags or {}).items() if value is not None})
    if path is None and given.get("model.id", ("toy",))[0] == "toy":
        path = Path(__file__).parent / "configs" / "toy.toml"
    values = {} if path is None else {key: (value, str(path)) for key, value in _read_toml(Path(path))}
    values |= given
    sections = {}
    for section, kind in SECTIONS.items():
        own = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(section + ".")}
        typed = {name: _typed(f"{section}.{name}", value, origin) for name, (value, origin) in own.items()}
        try:
            sections[section] = kind(**typed)
        except UserError as error:  # says "section.key is ...": add where that value was written
            origin = next((o for name, (_, o) in own.items() if str(error).startswith(f"{section}.{name} ")), None)
            raise UserError(f"{origin}: {error}" if origin else str(error)) from None
    return Config(**sections)


def to_toml(config: Config) -> str:
    """The config as TOML that `load_config` reads back to an equal one. Keys that are None are left out."""
    lines = []
    for section, values in dataclasses.asdict(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in values.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def difference(old: Config, new: Config) -> list[str]:
    """One line per key that differs, like "sampler.budget: 8 -> 4"."""
    before, after = _flat(old), _flat(new)
    return [f"{key}: {_shown(before[key])} -> {_shown(after[key])}" for key in before if before[key] != after[key]]


def _flat(config: Config) -> dict[str, Any]:
    return {f"{s}.{key}": value for s, values in dataclasses.asdict(config).items() for key, value in values.items()}


def _shown(value: Any) -> str:
    return "not set" if value is None else _toml_value(value)


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        # TOML's basic strings are JSON's, but that they also escape DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


def _read_toml(path: Path) -> Iterator[tuple[str, Any]]:
    """("section.key", value) for everything in the file."""
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise UserError(f"{path} has {path.stat().st_size} bytes; a config has at most {SIZE_LIMIT}")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"config {path} is not valid TOML: {' '.join(str(error).split())[:300]}") from error
    for section, values in content.items():
        if section not in SECTIONS:
            wanted = _one_of(section, [f"[{name}]" for name in SECTIONS])
            raise UserError(f"{path}: there is no section [{section}]; it must be {wanted}")
        if not isinstance(values, dict):
            raise UserError(f"{path}: {section} must be a section, [{section}], not a value")
        for key, value in values.items():
            _check_key(f"{section}.{key}", str(path))
            yield f"{section}.{key}", value


def _command_line(overrides: Iterable[str], flags: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """{"section.key": (value, where it was written)} of `--set` and the flags."""
    given = {key: (value, FLAGS[key]) for key, value in flags.items()}
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not text:
            raise UserError(f"--set {override}: write it as section.key=value, like --set mstep.lr=2e-5")
        _check_key(key, "--set")
        if key in given:
            raise UserError(f"{key} is given twice on the command line, by {given[key][1]} and --set; give it once")
        try:
            parsed = tomllib.loads(f"value = {text}")
        except (ValueError, RecursionError):
            parsed = {}
        value = parsed["value"] if parsed.keys() == {"value"} else text
        # Texts need no quotes, whatever they look like: --set model.id=7
        is_text = str in _types(_hints(SECTIONS[key.partition(".")[0]])[key.partition(".")[2]])
        given[key] = (text if is_text and not isinstance(value, str) else value, "--set")
    return given


def _check_key(key: str, origin: str) -> None:
    known = {f"{section}.{name}" for section, kind in SECTIONS.items() for name in _hints(kind)}
    if key in known:
        return
    leaf = key.rpartition(".")[2]
    near = sorted(k for k in known if k.endswith("." + leaf)) or difflib.get_close_matches(key, sorted(known), n=1)
    section = key.partition(".")[0]
    if near:
        advice = f"did you mean {' or '.join(near)}?"
    elif section in SECTIONS:
        advice = f"the keys of [{section}] are {', '.join(_hints(SECTIONS[section]))}"
    else:
        advice = f"a key is written as section.key, and the sections are {', '.join(SECTIONS)}"
    raise UserError(f"{origin}: there is no key {key}; {advice}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _types(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type hint: str | None -> (str, None)."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _typed(key: str, value: Any, origin: str) -> Any:
    """The value as its key's type wants it, or UserError."""
    section, _, name = key.partition(".")
    hint = next(t for t in _types(_hints(SECTIONS[section])[name]) if t is not type(None))
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UserError(f"{origin}: {key} is {_any(value)}; it must be {_one_of(value, choices)}")
        return value
    if hint is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        wanted = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}[hint]
        raise UserError(f"{origin}: {key} is {_any(value)}; it must be {wanted}")
    if hint is str and (not value or any("\ud800" <= c <= "\udfff" for c in value)):
        raise UserError(f"{origin}: {key} is {value!r}; it must be a text that is valid Unicode and not empty")
    return value


def _any(value: Any) -> str:
    """Whatever TOML may hold, short enough for a sentence."""
    try:
        shown = _toml_value(value) if isinstance(value, str | bool | int | float) else str(value)
    except ValueError:  # Python prints no integer of thousands of digits
        shown = "too long to show"
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _require(section: str, values: Any, **rules: tuple[bool, str]) -> None:
    for name, (valid, wanted) in rules.items():
        if not valid:
            raise UserError(f"{section}.{name} is {_any(getattr(values, name))}; it must be {wanted}")


def _one_of(value: Any, choices: Iterable[str], more: str = "") -> str:
    names = list(choices)
    listed = " ".join(filter(None, ["one of " + ", ".join(names), more]))
    near = difflib.get_close_matches(str(value), names, n=1)
    return f"{listed} (did you mean {near[0]}?)" if near else listed


def _is_reference(name: str) -> bool:
    """Is it written as module:name?"""
    module, _, attribute = name.partition(":")
    return attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))
