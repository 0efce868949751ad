"""Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before triton is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))  # house, resources, make_toy
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    # exp and log run to infinity in the kernels as on any GPU; numpy, on which the interpreter runs them, remarks on it
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    from tests.mutations import TRIED

    if hasattr(session.config, "workeroutput"):  # of a worker of pytest-xdist; it goes to the process that prints
        session.config.workeroutput["tried"] = dict(TRIED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    from tests.mutations import TRIED

    TRIED.update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from tests.mutations import TRIED

    if TRIED:
        each = ", ".join(f"{what} {number:,}" for what, number in sorted(TRIED.items()))
        terminalreporter.write_line(f"fuzzed: {TRIED.total():,} cases: {each}")
