"""Prompts: a question as chat messages, plain or with a hint that shows the answer.

    messages(question)                        # what is trained on and evaluated
    messages(question, hint="forward")        # what `star` and `pps` draw from: names of HINTS

Every prompt asks for a last line `The best answer is X`, which minem.data.verdict reads. The model's own chat template
turns the messages into text. The paper's wording is not public; these are ours.
"""

from minem.data.tasks import Question
from minem.errors import UserError
from minem.model.tokenizer import Tokenizer

ANSWER_LINE = "The best answer is"

# {label} is the right one, or the answer itself. A hint stands just before the request for the last line.
HINTS = {
    # Asks for the reasoning that the question needs, not for a defence of the answer.
    "forward": (
        "The correct answer is {label}. Reason from the question to this answer, one true step after the other, "
        "as if you had found it yourself."
    ),
    # Asks for a derivation first: showing the answer is known to hurt where it can be copied instead of reached.
    "derive": (
        "First derive the answer from the question alone. Only then compare it with the correct answer, which is "
        "{label}; if they differ, find the step that went wrong and derive it again."
    ),
    # Asks for a defence of the answer: easy to follow, and an invitation to bend a step.
    "justify": "The correct answer is {label}. Explain why it is correct.",
}


def messages(question: Question, hint: str | None = None) -> list[dict[str, str]]:
    """One user message: question, options, hint, request for the last line."""
    options = "\n".join(f"{label}. {option}" for label, option in zip(question.labels, question.options, strict=True))
    shown = HINTS[hint].format(label=question.gold) if hint is not None else ""
    parts = [question.text, options, shown, request(question)]
    return [{"role": "user", "content": "\n\n".join(part for part in parts if part)}]


def request(question: Question) -> str:
    """The closing sentence, with this question's own labels; of free-form questions the same for every answer."""
    if question.labels:
        what = ", ".join(question.labels[:-1]) + f" or {question.labels[-1]}"
    else:
        what = "the answer alone, in digits if it is a number"
    return f'Reason step by step, then end with a last line "{ANSWER_LINE} X", where X is {what}.'


def encode_prompt(tokenizer: Tokenizer, question: Question, hint: str | None = None) -> list[int]:
    """Token ids of the plain prompt, or of the hinted one in the wording `hint`; through the model's chat template.

    Without a template they are those of the text itself. UserError names a question on which the template fails.
    """
    chat = messages(question, hint)
    try:
        if tokenizer.has_chat_template:
            return tokenizer.chat(chat)
        return tokenizer.encode("\n\n".join(message["content"] for message in chat) + "\n")
    except UserError as error:
        raise UserError(f"question {question.id!r}: {error}") from error
