"""Values with a syntax of their own."""

import argparse
import ast
from typing import Any


def moe_freq_type(x: Any) -> int | list[int]:
    """Value of ``--moe-layer-freq``: an integer, or a list expression such as ``([0]+[1]*23)``.

    The expression may use lists, ``+``, ``*``, parentheses and integers; nothing in it is executed.

    Returns:
        The integer, or a list of 0 and 1 with one entry per layer.

    Raises:
        argparse.ArgumentTypeError: neither of the two.
    """
    if isinstance(x, int):
        return x
    if isinstance(x, list):
        pattern = x
    elif "[" in x:
        pattern = _pattern(x)
    else:
        try:
            return int(x)
        except ValueError:
            raise argparse.ArgumentTypeError(_FREQUENCY_HELP.format(x)) from None
    if not isinstance(pattern, list) or any(entry not in (0, 1) for entry in pattern):
        raise argparse.ArgumentTypeError(_FREQUENCY_HELP.format(x))
    return pattern


_FREQUENCY_HELP = "{!r} is neither an integer nor a list of 0 and 1 such as ([0]+[1]*3)"
_MAX_LAYERS = 100_000


def _pattern(text: str) -> Any:
    try:
        return _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, TypeError):
        raise argparse.ArgumentTypeError(_FREQUENCY_HELP.format(text)) from None


def _evaluate(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_evaluate(entry) for entry in node.elts]
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, (ast.Add, ast.Mult)):
        raise ValueError("only lists, +, * and integers")
    left, right = _evaluate(node.left), _evaluate(node.right)
    if isinstance(node.op, ast.Add):
        return left + right
    if _length(left) * _length(right) > _MAX_LAYERS:
        raise ValueError("longer than any model")
    return left * right


def _length(operand: int | list) -> int:
    return len(operand) if isinstance(operand, list) else abs(operand)


def attention_backend(name: Any) -> Any:
    """Member of ``AttnBackend`` by its name."""
    from megatron.core.transformer.enums import AttnBackend

    if isinstance(name, AttnBackend):
        return name
    names = AttnBackend.__members__
    if name not in names:
        raise argparse.ArgumentTypeError(
            f"{name!r} is not one of {', '.join(names)}{suggestion(name, names)}"
        )
    return AttnBackend[name]


def names_of_overrides(words: str) -> list[str]:
    """The names in a comma-separated list."""
    return [name.strip() for name in words.split(",") if name.strip()]


def suggestion(word: Any, known: Any) -> str:
    """``; did you mean X?`` for the known word nearest to ``word``, or nothing."""
    from difflib import get_close_matches

    near = get_close_matches(str(word), [str(entry) for entry in known], n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
