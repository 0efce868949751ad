"""Where the kernels' tests run: natively on a GPU, or where there is none in Triton's interpreter or on their PTX.

    python -m pytest --ptx sm_90 tests/kernels            # what would be launched on an H100, executed by ptx/

Two things that the interpreter does otherwise than any GPU are put right here: it truncates when it narrows fp32 to
bf16, where the hardware rounds to nearest even, and it multiplies bf16 matrices as if their bit patterns were integers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

RAN: Counter[str] = Counter()  # launches by kernel and variant, and the tests that launched any


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ptx", metavar="TARGET", help="run the Triton kernels on their PTX for TARGET, as sm_90")


def pytest_configure(config: pytest.Config) -> None:
    target = config.getoption("ptx", None)
    if target is not None:
        os.environ.pop("TRITON_INTERPRET", None)  # set by tests/conftest.py; triton is not imported yet
        from tests.kernels.ptx.launch import install

        install(target)
    elif os.environ.get("TRITON_INTERPRET") == "1":
        _mend_interpreter()


def _mend_interpreter() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            narrow = torch.from_numpy(data.copy()).to(torch.bfloat16)
            return narrow.view(torch.int16).numpy().view("uint16")
        return convert(data, source, target, mode)

    interpreter._convert_float = convert_rounding
    dot = interpreter.InterpreterBuilder.create_dot

    def dot_widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(
            self, *(self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest
        )

    interpreter.InterpreterBuilder.create_dot = dot_widened


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On PTX the eager references have nothing to show, nor have tests whose child processes compile on their own."""
    if config.getoption("ptx", None) is not None:
        apart = [
            item
            for item in items
            if item.path.stem in ("test_resources", "test_bench", "test_backend", "test_ptx", "test_counts")
            or getattr(getattr(item, "callspec", None), "params", {}).get("backend") == "eager"
        ]
        items[:] = [item for item in items if item not in apart]
        config.hook.pytest_deselected(items=apart)


@pytest.fixture(autouse=True)
def _count_launches(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.config.getoption("ptx", None) is None:
        yield
        return
    from tests.kernels.ptx.launch import LAUNCHES

    before = len(LAUNCHES)
    yield
    RAN.update(f"{done.kernel} {done.variant}" for done in LAUNCHES[before:])
    RAN["tests"] += len(LAUNCHES) > before


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of a worker of pytest-xdist; it goes to the process that prints
        session.config.workeroutput["ran"] = dict(RAN)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    RAN.update(getattr(node, "workeroutput", {}).get("ran", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("ptx", None) is not None:
        variants = RAN.keys() - {"tests"}
        kernels = {name.split()[0] for name in variants}
        about = f"{RAN['tests']} tests ran {len(kernels)} kernels in {len(variants)} variants"
        terminalreporter.write_line(f"PTX of {config.getoption('ptx')}: {about}")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device on which Triton kernels can be called here."""
    on_ptx = request.config.getoption("ptx", None) is not None
    return "cuda" if torch.cuda.is_available() and not on_ptx else "cpu"
