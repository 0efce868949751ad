"""Prompts: a question as chat messages, plain or with a hint that shows the answer.

    messages(question)                        # what is trained on and evaluated
    messages(question, hint="forward")        # what `star` and `pps` draw from: names of HINTS

Every prompt ends by asking for a last line `The best answer is X`, which is what minem.data.verdict reads. The model's
own chat template turns the messages into text. The wording of the paper that minem follows is not public; these are
ours.
"""

from __future__ import annotations

from minem.data.tasks import Question
from minem.errors import UserError

ANSWER_LINE = "The best answer is"

# {label} is the right one. A hint stands between the options and the request for the last line.
HINTS = {
    # Asks for the reasoning that the question calls for, not for a defence of the answer.
    "forward": (
        "The correct answer is {label}. Reason from the question to this answer, one true step after the other, "
        "as if you had found it yourself."
    ),
    # Asks for a derivation first: showing the answer is known to hurt where it can be copied instead of reached.
    "derive": (
        "First derive the answer from the question alone. Only then compare it with the correct answer, which is "
        "{label}; if they differ, find the step that went wrong and derive it again."
    ),
    # Asks for a defence of the answer: cheap to follow, and an invitation to bend a step.
    "justify": "The correct answer is {label}. Explain why it is correct.",
}
DEFAULT_HINT = "forward"


def messages(question: Question, hint: str | None = None) -> list[dict[str, str]]:
    """One user message: the question, its options, the hint if one is named, and the request for the last line.

    Raises UserError for a hint that HINTS does not have.
    """
    if hint is not None and hint not in HINTS:
        raise UserError(f"there is no hint {hint!r}: the wordings are {', '.join(HINTS)}")
    options = "\n".join(f"{label}. {option}" for label, option in zip(question.labels, question.options, strict=True))
    parts = [question.text, options, request(question)]
    if hint is not None:
        parts.insert(2, HINTS[hint].format(label=question.gold))
    return [{"role": "user", "content": "\n\n".join(parts)}]


def request(question: Question) -> str:
    """The closing sentence, with this question's own labels."""
    labels = ", ".join(question.labels[:-1]) + f" or {question.labels[-1]}"
    return f'Reason step by step, then end with a last line "{ANSWER_LINE} X", where X is {labels}.'
