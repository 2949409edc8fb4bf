"""Plain arithmetic, exactly: numbers, + - * / ** and parentheses, and nothing else a text may hold.

Fractions, not floats, so that 0.1 + 0.2 = 0.3 holds. Names, calls and huge powers are refused.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

LENGTH_MAX: Final = 200
EXPONENT_MAX: Final = 64
BITS_MAX: Final = 1024
EQUATIONS_MAX: Final = 20

_BINARY: Final[Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS: Final[tuple[tuple[str, str], ...]] = (
    (r"\\(?:times|cdot)(?![a-z])|[×✕·]", "*"),
    (r"\\div(?![a-z])|÷", "/"),
    (r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}", r"((\1)/(\2))"),
    (r"\\(?:approx)(?![a-z])|≈", "≈"),
    (r"[−–－]", "-"),
    (r"(?<=[\d)])\s*\^\s*\{?(\d+)\}?", r"**\1"),
    (r"(?<=\d)\s*[xX]\s*(?=\d)", "*"),
    (r"(?<=\d),(?=\d{3}(?!\d))", ""),
    (r"\\[()\[\]]|[$¥￥€£`]|\*\*(?=\D)|(?<=\D)\*\*|\\[ ,;!]", " "),
    (r"（", "("),
    (r"）", ")"),
    (r"＝", "="),
)
_TAIL: Final = re.compile(r"[\d.+\-*/() ]*\Z")
_HEAD: Final = re.compile(r"\A[\d.+\-*/() ]*")
_OPERATION: Final = re.compile(r"\d[\d.) ]*(?:\*\*|[+\-*/])[( ]*[\d.]")
_NUMBER_TEXT: Final = re.compile(r"-?\d+(?:\.(\d+))?")
_ASKED: Final = re.compile(r"[\d.()][\d.+\-*/() ]*[\d.)]")
_DATE: Final = re.compile(r"\d+[-/]\d+[-/]\d+|\d{3,}-\d{3,}")


@dataclass(frozen=True, slots=True)
class Equation:
    """What a text claims, and what `left` really comes to."""

    left: str
    right: str
    value: Fraction
    holds: bool


def evaluate(expression: str) -> Fraction:
    """The exact value.

    Raises:
        ValueError: it is not plain arithmetic, divides by zero, or would grow out of bounds.
    """
    if len(expression) > LENGTH_MAX:
        raise ValueError(f"The expression is longer than {LENGTH_MAX} characters.")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body, expression.strip())
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} has no value: {error}.") from None


def find_equations(text: str) -> list[Equation]:
    """The equations of plain numbers in a text, such as 12 × 7 = 84, in order, at most twenty."""
    found: list[Equation] = []
    for line in normalise(text).splitlines():
        sides = re.split(r"([=≈])", line)
        for index in range(1, len(sides) - 1, 2):
            equation = _equation(sides[index - 1], sides[index + 1], loose=sides[index] == "≈")
            if equation is not None and equation not in found:
                found.append(equation)
    return found[:EQUATIONS_MAX]


def find_sums(text: str) -> list[tuple[str, Fraction]]:
    """Expressions a question asks about, such as 37 * 48, each with its value; none that are dates or ranges."""
    found: list[tuple[str, Fraction]] = []
    for match in _ASKED.finditer(_DATE.sub(" ", normalise(text))):
        expression = _balance(match.group().strip())
        if _OPERATION.search(expression):
            try:
                found.append((expression, evaluate(expression)))
            except ValueError:
                continue
    return found[:EQUATIONS_MAX]


def show(value: Fraction, digits: int = 6) -> str:
    """The value as people write it: 84, 0.125, 3.333333."""
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.{digits}f}".rstrip("0").rstrip(".")


def normalise(text: str) -> str:
    """The text with the signs of mathematics and LaTeX replaced by those of Python."""
    for pattern, sign in _SIGNS:
        text = re.sub(pattern, sign, text)
    return text


def _equation(before: str, after: str, *, loose: bool) -> Equation | None:
    tail, head = _TAIL.search(before), _HEAD.search(after)
    left = _balance(tail.group().strip()) if tail else ""
    right = _balance(head.group().strip().rstrip("+-*/.( ")) if head else ""
    left = left.lstrip("*/.) ")
    if not _OPERATION.search(left) or not right or (tail and _touches_name(before, tail.start())):
        return None
    try:
        value, claimed = evaluate(left), evaluate(right)
    except ValueError:
        return None
    return Equation(left, right, value, abs(value - claimed) <= _tolerance(right, claimed, loose=loose))


def _touches_name(before: str, start: int) -> bool:
    """Whether a letter stands directly before, as in x2 + 3: that is algebra."""
    return (
        start > 0 and before[start - 1].isascii() and before[start - 1].isalpha() and before[start : start + 1] != " "
    )


def _tolerance(right: str, claimed: Fraction, *, loose: bool) -> Fraction:
    """Half a unit of the last decimal shown; one percent where the text says 'about'."""
    if loose:
        return abs(claimed) / 100 + Fraction(1, 2)
    decimals = _NUMBER_TEXT.fullmatch(right)
    return Fraction(1, 2 * 10 ** len(decimals.group(1))) if decimals and decimals.group(1) else Fraction(0)


def _balance(expression: str) -> str:
    """The expression without parentheses that have no partner at its ends."""
    while expression.count(")") > expression.count("("):
        cut = expression.rstrip()
        expression = cut[:-1].rstrip() if cut.endswith(")") else expression[expression.index(")") + 1 :].strip()
    while expression.count("(") > expression.count(")"):
        cut = expression.lstrip()
        expression = cut[1:].lstrip() if cut.startswith("(") else expression[: expression.rindex("(")].strip()
    return expression


def _value(node: ast.expr, source: str) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(Fraction(ast.get_source_segment(source, node) or "0"))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, source)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, source), _value(node.right, source)
        if isinstance(node.op, ast.Pow):
            if right.denominator != 1 or abs(right) > EXPONENT_MAX:
                raise ValueError(f"The exponent {right} is not a whole number up to {EXPONENT_MAX}.")
            return _bounded(Fraction(left ** int(right)))
        if operation := _BINARY.get(type(node.op)):
            return _bounded(operation(left, right))
    raise ValueError(f"{ast.unparse(node)!r} is not plain arithmetic.")


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > BITS_MAX:
        raise ValueError("The number is too large.")
    return value
