"""What the words of a config stand for on this machine, and fingerprints of what a run reads besides its config.

python -c "from minem.choices import *; device = pick_device('auto'); print(device, pick_dtype('auto', device))"
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minem.data import verdict
from minem.data.prompts import messages
from minem.data.tasks import Question
from minem.errors import UserError
from minem.estep import Verdict
from minem.model import Model
from minem.samplers import import_object
from minem.tokenizer import FILES, Tokenizer
from minem.untrusted import own_file

SMALL_MODEL = 10_000_000  # parameters


def pick_device(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" means here.

    Raises:
        UserError: CUDA was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device = 'cuda', but torch sees no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the working weights: "auto" is bfloat16 on a GPU and float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def fingerprint(folder: Path) -> str:
    """SHA-256 over the weights and the config of a model folder: a run is continued on the same model only."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(own_file(folder, found.name) for found in folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def hash_tokenizer(tokenizer: Tokenizer) -> dict[str, str]:
    """SHA-256 of the tokenizer's files with the ids that end a text, and of the chat template."""
    digest = hashlib.sha256(repr(sorted(tokenizer.eos_ids)).encode())
    for path in (tokenizer.folder / name for name in FILES):
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"-")
    template = (tokenizer.chat_template or "").encode("utf-8", "surrogatepass")
    return {"tokenizer": digest.hexdigest(), "chat template": hashlib.sha256(template).hexdigest()}


def hash_source(name: str) -> str:
    """SHA-256 of the file that the module of "module:name" was imported from; "" where it has none."""
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def hash_prompts(questions: Sequence[Question], hint: str) -> str:
    """SHA-256 of the words that questions are put in, plain and with the hint, before any chat template."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([messages(question), messages(question, hint)]).encode())
    return digest.hexdigest()


def set_deterministic(device: torch.device, wanted: bool) -> None:
    """Whether PyTorch may use what does not repeat bit for bit on a GPU: the backward pass of flash attention, say.

    Call it before anything is computed: cuBLAS reads its part of it once. On the CPU there is nothing to choose.
    """
    if device.type == "cuda":
        if wanted:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(wanted)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow, against bugs


def limit_threads(model: Model) -> None:
    """One thread on the CPU for a model as small as the toy, unless OMP_NUM_THREADS says otherwise.

    Its matrix products are too short to share: two threads gain nothing in generation, and where another process wants
    a core they wait for each other at every product (an E-step of 5 s was seen to take a minute).
    """
    small = sum(p.numel() for p in model.parameters()) < SMALL_MODEL
    if model.device.type == "cpu" and small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def pick_verdict(name: str | None) -> Verdict:
    """The strict verdict, or the user's own function by "module:function"."""
    if name is None:
        return verdict.strict
    own: Callable[..., Any] = import_object(name, "task.verdict")
    if not callable(own):
        raise UserError(f"task.verdict = {name!r} is not a function")

    def checked(text: str, question: Question) -> str | None:
        try:
            answer = own(text, question)
        except Exception as error:  # it is the user's: whatever it raises is told with the question it failed on
            raise UserError(f"task.verdict {name!r} raised {error!r} on question {question.id!r}") from error
        if answer is not None and not isinstance(answer, str):
            raise UserError(
                f"task.verdict {name!r} must return a text or None, not {answer!r} (question {question.id!r})"
            )
        return answer

    return checked
