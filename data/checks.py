"""The share of valid rationales, on the tasks whose steps a program can check.

valid_share(load_task("toy"), [("toy-train-001", "8 + 5 = 3\\n...")])    # 1.0 if every step is right
"""

from collections.abc import Sequence

from minem.data.tasks import Task
from minem.data.toy import check as toy
from minem.data.word_problems import check as word_problems

CHECKS = {"toy": toy.valid_steps, "word-problems": word_problems.valid_steps}


def valid_share(task: Task, rationales: Sequence[tuple[str, str]]) -> float | None:
    """The share of (question id, text) with valid steps throughout; None on tasks without a check."""
    if task.name not in CHECKS or not rationales:
        return None
    questions = {question.id: question for question in task.train}
    return sum(CHECKS[task.name](text, questions[id_]) for id_, text in rationales) / len(rationales)
