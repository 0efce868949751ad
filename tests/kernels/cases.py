"""Which shapes a kernel runs at in Triton's interpreter, where a program takes 20 to 60 ms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def both(shapes: Sequence[Any], quick: int = 2) -> list[Any]:
    """(backend, shape): eager at every shape, triton at the first `quick`, and at the others in slow tests.

    The slow ones prove the masks at further sizes: 1, powers of two and their neighbours, several blocks, odd heads.
    """
    eager = [pytest.param("eager", shape, id=f"eager-{shape}") for shape in shapes]
    triton = [
        pytest.param("triton", shape, id=f"triton-{shape}", marks=[] if i < quick else [pytest.mark.slow])
        for i, shape in enumerate(shapes)
    ]
    return [*eager, *triton]
