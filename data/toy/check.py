"""The toy's arithmetic, and a check that every step of a rationale holds.

    valid_steps("3 + 4 = 7\n7 * 2 = 4\nThe best answer is 4", question)    # True for 3, add 4, multiply by 2

A right answer can be reached by a false step, which the filter cannot see; on the toy a program can.
"""

import re

from minem.data import verdict
from minem.data.rows import Question

# How a question names an operation, how a rationale writes it, and what it does.
OPERATIONS = {"add": "+", "subtract": "-", "multiply by": "*"}
_ASKED = re.compile(rf"({'|'.join(OPERATIONS)}) (\d)")


def apply(symbol: str, value: int, operand: int) -> int:
    """value (symbol) operand modulo 10, all of them digits."""
    return {"+": value + operand, "-": value - operand, "*": value * operand}[symbol] % 10


def asked_steps(question: Question) -> tuple[int, list[tuple[str, int]]]:
    """The starting value and the (symbol, operand) of each step that the question's text asks for."""
    (start,) = re.findall(r"start with (\d)", question.text)
    return int(start), [(OPERATIONS[name], int(operand)) for name, operand in _ASKED.findall(question.text)]


def valid_steps(text: str, question: Question) -> bool:
    """Whether a rationale does each step of the question in order, one a line, truly, and answers with the result."""
    *lines, last = text.strip().split("\n")
    value, asked = asked_steps(question)
    steps = []
    for symbol, operand in asked:
        result = apply(symbol, value, operand)
        steps.append(f"{value} {symbol} {operand} = {result}")
        value = result
    return [line.strip() for line in lines] == steps and verdict.strict(last, question) == str(value)
