"""The config of a run: six small sections, read from TOML and flags, and checked before anything starts.

    minem train CONFIG.toml --set mstep.lr=2e-5 --set sampler.draws=all

Every key has a default, so a config names only what differs; `configs/` holds commented examples. A mistake is one
sentence that says where it stands (file or flag), which key it is, what would be right, and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from minem.data.tasks import TaskConfig
from minem.errors import UserError, is_reference, one_of, shown
from minem.evaluate import EvalConfig
from minem.mstep import MStepConfig
from minem.run import RunConfig
from minem.samplers import SamplerConfig
from minem.settings import difference, to_toml
from minem.untrusted import read_toml
from minem.weights import WeightsConfig

__all__ = ["FLAGS", "Config", "difference", "load_config", "origins", "to_toml"]

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


CODE = ("sampler.name", "task.verdict")  # keys that may name a user's own code, module:name


@dataclass(frozen=True)
class Config:
    """What a run is; each section is owned by the module that uses it.

    Two runs with equal configs, `run.out` apart, are the same experiment.
    """

    model: WeightsConfig = field(default_factory=WeightsConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    mstep: MStepConfig = field(default_factory=MStepConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """What no section can know alone."""
        if self.mstep.weights != "equal" and self.sampler.draws != "all":
            raise UserError(
                f'mstep.weights = "{self.mstep.weights}" weighs the accepted draws of a question against each other, '
                f'so it needs sampler.draws = "all", not "{self.sampler.draws}", which keeps one at most'
            )
        if not self.mstep.answer_tokens and self.sampler.filter == "none":
            raise UserError(
                'mstep.answer_tokens = false leaves out the answer line, which draws kept by sampler.filter = "none" '
                'may lack; it needs sampler.filter = "correct"'
            )
        if self.mstep.optimizer_state == "keep" and self.run.init == "base":
            raise UserError(
                'mstep.optimizer_state = "keep" goes on from the last M-step, and run.init = "base" starts each from '
                "the base model: leave one of the two out"
            )


SECTIONS: dict[str, type] = {f.name: typing.cast(type, f.default_factory) for f in dataclasses.fields(Config)}


def load_config(
    path: str | Path | None = None, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> Config:
    """Compose a config from a TOML file, `--set` overrides ("section.key=value") and flags, the later ones winning.

    path: None starts from the embedded toy's own config as long as `model.id` stays "toy", else from the defaults.
    flags: {"sampler.budget": 8, ...}, the keys those of FLAGS; None means that the flag was not given.

    Raises UserError for a file that cannot be read, unknown sections and keys, and values of a wrong type or range.
    """
    values = _compose(path, overrides, flags or {})
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


def origins(
    path: str | Path | None = None, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Where each value of the same `load_config` was written: {"sampler.budget": "--budget", "mstep.lr": "my.toml"}.

    Keys that are not in it have their default.
    """
    return {key: origin for key, (_, origin) in _compose(path, overrides, flags or {}).items()}


def _compose(path: str | Path | None, overrides: Iterable[str], flags: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """{"section.key": (value, where it was written)} of the file and the command line."""
    given = _command_line(overrides, {key: value for key, value in flags.items() if value is not None})
    if path is None and given.get("model.id", ("toy",))[0] == "toy":
        path = Path(__file__).parent / "configs" / "toy.toml"
    values = {} if path is None else {key: (value, str(path)) for key, value in _read_toml(Path(path))}
    return values | given


def _read_toml(path: Path) -> Iterator[tuple[str, Any]]:
    """("section.key", value) for everything in the file."""
    try:
        content = read_toml(path)
    except UserError as error:
        raise UserError(f"config {error}") from error
    for section, values in content.items():
        if section not in SECTIONS:
            wanted = one_of(section, [f"[{name}]" for name in SECTIONS])
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


def _check_code(key: str, name: str, origin: str) -> None:
    """A file may come from anybody, and with `shutil:rmtree` for an answer check it would delete what a model names.

    So it may name minem's own code and that in the folder where the user stands; other code is for the command line.
    """
    module = name.partition(":")[0]
    top = module.partition(".")[0]
    place = Path.cwd().joinpath(*module.split("."))
    here = place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()
    if top != "minem" and (top in sys.stdlib_module_names or not here):
        flag = f"{FLAGS[key]} {name}"
        raise UserError(
            f"{origin}: {key} is {shown(name)}, which is no code of this folder; a config may not run code from "
            f"elsewhere: if you trust it, give {flag} on the command line"
        )


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
            raise UserError(f"{origin}: {key} is {shown(value)}; it must be {one_of(value, choices)}")
        return value
    if hint is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        wanted = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}[hint]
        raise UserError(f"{origin}: {key} is {shown(value)}; it must be {wanted}")
    if hint is str and (not value or any("\ud800" <= c <= "\udfff" or c == "\0" for c in value)):
        raise UserError(
            f"{origin}: {key} is {value!r}; it must be a text that is valid Unicode and not empty, without NUL"
        )
    if key in CODE and is_reference(value) and origin not in ("--set", FLAGS[key]):
        _check_code(key, value, origin)
    return value
