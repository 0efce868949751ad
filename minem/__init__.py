"""minem: teach language models to reason by expectation maximization.

    model, tokenizer = minem.load("Qwen/Qwen2.5-0.5B-Instruct")
    generator = minem.Generator(model, tokenizer)
    completions = generator.generate(["..."], minem.SamplingParams(n=4))
    minem.save(model, tokenizer, "folder")

`import minem` loads no torch: each name is imported on first use, so that `minem --help` answers at once. A run is
`minem.train.train(config)`.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "load": "minem.model.weights",
    "save": "minem.model.weights",
    "Generator": "minem.generation.generator",
    "SamplingParams": "minem.generation.request",
    "Completion": "minem.generation.request",
    "Request": "minem.generation.request",
    "Sampler": "minem.em.samplers",
    "Budgeted": "minem.em.samplers",
    "Question": "minem.data.tasks",
}

__all__ = [
    "Budgeted",
    "Completion",
    "Generator",
    "Question",
    "Request",
    "Sampler",
    "SamplingParams",
    "__version__",
    "load",
    "save",
    "train",
]

if TYPE_CHECKING:  # for type checkers and editors, which do not run __getattr__
    from minem import train
    from minem.data.tasks import Question
    from minem.em.samplers import Budgeted, Sampler
    from minem.generation.generator import Generator
    from minem.generation.request import Completion, Request, SamplingParams
    from minem.model.weights import load, save


def __getattr__(name: str) -> Any:
    if name == "train":  # the module: Python binds it to this name as soon as anything imports it
        return importlib.import_module("minem.train")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'minem' has no attribute {name!r}")
