"""Writes the word problems from wordings.toml: two and three steps in plain English, whole-number answers.

    python data/word_problems/make.py            # rewrites train, validation and test.jsonl, byte for byte

The numbers of a problem, in whatever order, decide its split: no set of numbers is in two of them. They differ, and
one formula alone reaches the answer with each of them (check.py). Each structure has one wording that only test has.
"""

import json
import random
import re
import tomllib
from pathlib import Path
from typing import Any

from minem.data.word_problems.check import solutions, value

HERE = Path(__file__).parent
SEED = 0
SIZES = {"train": 1200, "validation": 200, "test": 400}
GIRLS = ("Anna", "Bella", "Clara", "Emma", "Grace", "Hana", "Julia", "Lena", "Maria", "Nina", "Olivia", "Priya", "Rosa")
BOYS = ("Adam", "Ben", "Carlos", "David", "Eric", "Felix", "Henry", "Ivan", "Jack", "Leo", "Omar", "Paul", "Tom")
SHE = {"he": "she", "him": "her", "his": "her", "He": "She"}


def draw_problem(page: dict[str, Any], rng: random.Random, split: str, seen: set[tuple[object, ...]]) -> dict[str, str]:
    """The row of a problem, without an id. Its wording and numbers are not in `seen`; they are added."""
    structure = rng.choice(page["structures"])  # once: each has its share, however few of its numbers will do
    while True:
        wording = rng.choice(structure["wordings"] + (structure["test_only"] if split == "test" else []))
        names = rng.sample(GIRLS + BOYS, 2)
        pronouns = SHE if names[0] in GIRLS else {word: word for word in SHE}
        numbers = {letter: rng.randint(*limits) for letter, limits in structure["ranges"].items()}
        things = rng.choice(page["things"])
        text = wording.format(N=names[0], M=names[1], things=things, **pronouns, **numbers)
        letters = re.findall("[a-z]", structure["formula"])
        answer = int(value(structure["formula"], [numbers[letter] for letter in letters]))
        key = sorted(set(numbers.values()))
        home = random.Random(str(key)).choices(list(SIZES), weights=list(SIZES.values()))[0]
        problem = (wording, *numbers.values())
        if home != split or problem in seen or answer < 1 or len(key) < len(numbers):
            continue
        if len(solutions(text, answer)) > 1:
            continue
        seen.add(problem)
        unseen = {"subject": f"{'unseen' if wording in structure['test_only'] else 'seen'} wordings"}
        return {"question": text, "answer": str(answer)} | (unseen if split == "test" else {})


def make_rows() -> dict[str, list[dict[str, str]]]:
    """The rows of each split. Those of the test split name in `subject` whether their wording is also in train."""
    page = tomllib.loads((HERE / "wordings.toml").read_text())
    rng = random.Random(SEED)
    seen: set[tuple[object, ...]] = set()
    return {
        split: [{"id": f"words-{split}-{i + 1:04}"} | draw_problem(page, rng, split, seen) for i in range(size)]
        for split, size in SIZES.items()
    }


def main() -> None:
    for split, rows in make_rows().items():
        (HERE / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
