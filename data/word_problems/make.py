"""Writes the word problems from wordings.toml: two and three steps in plain English, whole-number answers.

    python data/word_problems/make.py            # rewrites train, validation and test.jsonl, byte for byte

No two problems have the same numbers. The numbers of a problem differ, and only one formula reaches its answer with
each of them (check.py). Each structure has one wording that stands in the test split alone.
"""

import json
import random
import tomllib
from pathlib import Path
from typing import Any

from minem.data.word_problems.check import solutions

HERE = Path(__file__).parent
SEED = 0
SIZES = {"train": 1200, "validation": 200, "test": 400}
GIRLS = ("Anna", "Bella", "Clara", "Emma", "Grace", "Hana", "Julia", "Lena", "Maria", "Nina", "Olivia", "Priya", "Rosa")
BOYS = ("Adam", "Ben", "Carlos", "David", "Eric", "Felix", "Henry", "Ivan", "Jack", "Leo", "Omar", "Paul", "Tom")
SHE = {"he": "she", "him": "her", "his": "her", "He": "She"}
LARGEST = 99  # answer


def draw_problem(page: dict[str, Any], rng: random.Random, split: str, seen: set[tuple[int, ...]]) -> dict[str, str]:
    """The row of a problem whose sorted numbers are not in `seen`; they are added. Without an id."""
    structure = rng.choice(page["structures"])
    wording = rng.choice(structure["wordings"] + (structure["test_only"] if split == "test" else []))
    names = rng.sample(GIRLS + BOYS, 2)
    pronouns = SHE if names[0] in GIRLS else {word: word for word in SHE}
    words = {"N": names[0], "M": names[1], "things": rng.choice(page["things"]), **pronouns}
    while True:
        numbers = {letter: rng.randint(*limits) for letter, limits in structure["ranges"].items()}
        answer = eval(structure["formula"], {}, numbers)
        text = wording.format(**words, **numbers)
        key = tuple(sorted(set(numbers.values())))
        if not 0 < answer <= LARGEST or len(key) < len(numbers) or key in seen or len(solutions(text, answer)) > 1:
            continue
        seen.add(key)
        unseen = {"subject": f"{'unseen' if wording in structure['test_only'] else 'seen'} wordings"}
        return {"question": text, "answer": str(answer)} | (unseen if split == "test" else {})


def make_rows() -> dict[str, list[dict[str, str]]]:
    """The rows of each split. Those of the test split name in `subject` whether their wording is also in train."""
    page = tomllib.loads((HERE / "wordings.toml").read_text())
    rng = random.Random(SEED)
    seen: set[tuple[int, ...]] = set()
    return {
        split: [{"id": f"words-{split}-{i + 1:04}"} | draw_problem(page, rng, split, seen) for i in range(size)]
        for split, size in SIZES.items()
    }


def main() -> None:
    for split, rows in make_rows().items():
        (HERE / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
