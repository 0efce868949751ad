"""minem: teach language models to reason by expectation maximization.

    model, tokenizer = minem.load("Qwen/Qwen2.5-0.5B-Instruct")
    generator = minem.Generator(model, tokenizer)
    completions = generator.generate(["..."], minem.SamplingParams(n=4))
    minem.save(model, tokenizer, "folder")

`import minem` loads no torch: each name is imported on first use, so that `minem --help` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "load": "minem.model.weights",
    "save": "minem.model.weights",
    "Generator": "minem.generation.generator",
    "SamplingParams": "minem.generation.generator",
    "Completion": "minem.generation.generator",
    "Request": "minem.generation.generator",
}

__all__ = ["Completion", "Generator", "Request", "SamplingParams", "__version__", "load", "save"]

if TYPE_CHECKING:
    from minem.generation.generator import Generator
    from minem.generation.request import Completion, Request, SamplingParams
    from minem.model.weights import load, save


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'minem' has no attribute {name!r}")
