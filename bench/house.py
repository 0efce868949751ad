"""The figures of the house: lines per room, the largest files and functions, imports that go up, import circles.

python bench/house.py
"""

from __future__ import annotations

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("kernels", "data", "configs")
# Lowest first. A room is a folder of minem or a file at its top; it imports rooms on floors below its own.
FLOORS = (
    "text",
    "errors statistics",
    "console files plugins hub",
    "config device",
    "kernels",
    "model",
    "parallel generation",
    "data",
    "runs",
    "em",
    "report planning",
    "train",
    "compare",
    "commands",
    "cli",
    "__main__",
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
READING_PATH = [
    "model.decoder",
    "model.weights",
    "model.tokenizer",
    "generation.request",
    "generation.generator",
    "generation.engine",
    "generation.kv_cache",
    "em.loop",
    "em.sample",
    "em.samplers",
    "em.estep",
    "em.mstep",
    "em.masters",
    "em.packing",
    "em.weighting",
    "em.evaluate",
]


def sources() -> dict[str, Path]:
    """Every Python file of the package, by its dotted name without "minem."."""
    found = {}
    for home in (ROOT / "minem", *(ROOT / name for name in LINKS)):
        for path in home.rglob("*.py"):
            parts = path.relative_to(home).with_suffix("").parts
            if home.name != "minem" or parts[0] not in LINKS:  # the three links show the same files again
                found[".".join(parts if home.name == "minem" else (home.name, *parts))] = path
    return found


def imports(path: Path) -> set[str]:
    """What a file imports of minem anywhere, for types too, without "minem."."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("minem.") for name in found if name.startswith("minem.")}


def upward() -> list[str]:
    """Imports of a room that is not below: "em.loop -> report.page"."""
    wrong = []
    for name, path in sources().items():
        room = name.split(".")[0]
        for other in imports(path):
            target = other.split(".")[0]
            if room in FLOOR and target in FLOOR and target != room and FLOOR[target] >= FLOOR[room]:
                wrong.append(f"{name} -> {other}")
    return sorted(wrong)


def circle() -> list[str]:
    """The files of an import circle, if there is one."""
    files = sources()
    try:
        tuple(TopologicalSorter({name: imports(path) & files.keys() for name, path in files.items()}).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def functions() -> dict[str, int]:
    """Lines of each function and method, Triton kernels apart."""
    return {
        f"{name}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, path in sources().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list)
    }


def lines() -> dict[str, int]:
    """Lines of each file."""
    return {name: len(path.read_text().splitlines()) for name, path in sources().items()}


def figures() -> dict[str, int]:
    """What tests/test_house.py holds: sizes that may only fall."""
    return {
        "all lines": sum(lines().values()),
        "reading path": sum(lines()[name] for name in READING_PATH),
        "em.loop": lines()["em.loop"],
        "largest file": max(lines().values()),
        "largest function": max(functions().values()),
    }


def main() -> None:
    rooms = Counter[str]()
    for name, count in lines().items():
        rooms[name.split(".")[0]] += count
    for room, count in rooms.most_common():
        print(f"{count:6,}  {room}")
    for what, sizes in (("file", lines()), ("function", functions())):
        top = Counter(sizes).most_common(3)
        print(f"largest {what}s: " + ", ".join(f"{name} {count}" for name, count in top))
    print("; ".join(f"{name} {size:,}" for name, size in figures().items()))
    print(f"imports that go up: {', '.join(upward()) or 'none'}; import circle: {' -> '.join(circle()) or 'none'}")


if __name__ == "__main__":
    main()
