"""Rows of MAWPS: arithmetic word problems whose target is an equation."""

from __future__ import annotations

import math
import operator

from tpaw_core.data.messages import Unusable


def as_prompt_and_equation(item: dict[str, str]) -> dict[str, str]:
    """A MAWPS row: the question with its numbers masked, as it comes; the target is its equation in prefix notation."""
    try:
        question, equation, answer = item["Question"], item["Equation"], float(item["Answer"])
        value = _value(equation.split(), [float(number) for number in item["Numbers"].split()])
    except (KeyError, AttributeError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise Unusable(f"is not a MAWPS row ({type(error).__name__}: {error})") from None
    if not math.isclose(value, answer, rel_tol=1e-2, abs_tol=1e-2):
        raise Unusable(f"its equation {equation!r} evaluates to {value:g}, but its answer is {answer:g}")
    return {"prompt": question, "completion": f"#### {equation}"}


def _value(prefix: list[str], numbers: list[float]) -> float:
    """What an equation in prefix notation comes to."""
    apply = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    stack: list[float] = []
    for token in reversed(prefix):
        if token in apply:
            stack.append(apply[token](stack.pop(), stack.pop()))
        else:
            stack.append(numbers[int(token[6:])] if token.startswith("number") else float(token))
    (value,) = stack
    return value
