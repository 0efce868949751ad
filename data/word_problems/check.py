"""A check that the steps of a rationale are true and solve the problem itself; right answers by luck do not pass.

    valid_steps("3 boxes x 4 = 12. Then 12 - 5 = $7.\\nThe best answer is 7", question)    # True for (a * b) - c

No problem comes with a solution. The formula that uses each of its numbers once and reaches the answer is its solution,
and any chain of equations that comes to it is valid: 3 * 2 = 6, 4 * 2 = 8, 6 + 8 = 14 as well as 3 + 4 = 7, 7 * 2 = 14.
"""

import ast
import operator
import re
from collections.abc import Iterator, Sequence
from itertools import combinations, product

from minem.data import verdict
from minem.data.rows import Question

# Formulas are the same if they are on these numbers, put in the place of the question's own.
_ELSEWHERE = (100_003, 130_043, 170_047, 210_053)
READINGS = 4  # meanings of one number that are kept: 7 may be in the question and the result of 12 - 5
FAR = 10**30  # no problem's solution has such a value on _ELSEWHERE; a rationale that repeats itself may
_NUMBER = r"\(?\d{1,6}(?:\.\d{1,2})?\)?"
_EQUATION = re.compile(rf"(?<![\d.])({_NUMBER}(?:[-+*/]{_NUMBER}){{1,3}})=(-?\d{{1,6}}(?:\.\d{{1,2}})?)")

_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

Formula = tuple[int, int]  # its value on the question's numbers and on _ELSEWHERE


def value(expression: str, numbers: Sequence[float]) -> float:
    """What +, -, * and / make of these numbers, which stand in for those of the expression, from left to right."""
    return _value(ast.parse(expression, mode="eval").body, iter(numbers))


def _value(node: ast.expr, numbers: Iterator[float]) -> float:
    if not isinstance(node, ast.BinOp):
        return next(numbers)
    left = _value(node.left, numbers)
    return float(_OPERATIONS[type(node.op)](left, _value(node.right, numbers)))


def formulas(parts: tuple[Formula, ...]) -> set[Formula]:
    """All that +, - and * make of one to four formulas, each of them used once."""
    if len(parts) == 1:
        return set(parts)
    found = set()
    for i, j in combinations(range(len(parts)), 2):
        (a, x), (b, y) = parts[i], parts[j]
        rest = tuple(part for k, part in enumerate(parts) if k not in (i, j))
        for joined in ((a + b, x + y), (a - b, x - y), (b - a, y - x), (a * b, x * y)):
            found |= formulas((joined, *rest))
    return found


def solutions(text: str, answer: int) -> set[int]:
    """The values on other numbers of the formulas that reach `answer` with each number of a problem's text."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return {other for value, other in formulas(tuple(zip(numbers, _ELSEWHERE, strict=False))) if value == answer}


def equations(text: str) -> list[tuple[str, str]]:
    """(left side, result) of each "a op b = c", up to four numbers on the left; units and currencies are left out."""
    text = text.replace("\u00f7", "/").replace("\u2212", "-").replace("\\times", "\u00d7").replace("\u00a0", " ")
    text = re.sub(r"(?<=\d),(?=\d{3})|[*]{2,}|[$\\]", "", text)  # 1,000; bold; \$ and \(
    text = re.sub(r"(?<=[\d\s)])[xX\u00d7](?=\s*\(?\d)", "*", text)
    text = re.sub(r"/?[^\W\d_]+", " ", text)  # "4 apples/box" is 4
    return _EQUATION.findall(re.sub(r"(?<=[-+*/=(\d)])[^\S\n]+(?=[-+*/=)])|(?<=[-+*/=(])[^\S\n]+(?=[(\d])", "", text))


def valid_steps(text: str, question: Question) -> bool:
    """Whether every equation is true and on numbers of the question or earlier results, and the last is the solution.

    The last result must be the stated and the right answer. A rationale without an equation is not valid.
    """
    if verdict.strict(text, question) != question.gold:
        return False
    known: dict[float, list[float]] = {}  # a number that may be used -> what it can be on other numbers
    for number, other in zip(re.findall(r"\d+", question.text), _ELSEWHERE, strict=False):
        known[float(number)] = [other]
    last: list[float] = []
    for left, result in equations(text):
        if left.count("(") != left.count(")"):  # the bracket is around the equation
            left = re.sub("[()]", "", left)
        operands = [float(operand) for operand in re.findall(r"[\d.]+", left)]
        try:
            true = value(left, operands) == float(result)
            elsewhere = (value(left, numbers) for numbers in product(*(known[operand] for operand in operands)))
            last = [other for other in elsewhere if abs(other) < FAR]
        except (KeyError, SyntaxError, ArithmeticError):
            return False
        if not true:
            return False
        known[float(result)] = list(dict.fromkeys([*known.get(float(result), []), *last]))[:READINGS]
    return not solutions(question.text, int(question.gold)).isdisjoint(last)
