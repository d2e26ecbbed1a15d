"""Single-point changes of a Python source: a comparison, a sign, a constant, a condition or a boolean.

A change replaces the text of one expression by another expression, so that a changed file differs from the
original in one place. Strings, annotations, the arguments of raised errors and of warnings are left alone:
tests are not meant to pin the words of every message.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

# Several ways to get an order wrong: the boundary, and the direction.
_COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_SIGNS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
}
_TALKERS = {"warn", "warning", "info", "debug", "error", "log", "print", "log_single_rank", "warn_once"}


@dataclass(frozen=True)
class Change:
    """One change of one expression.

    Attributes:
        path: of the file, relative to the repository.
        scope: dotted name of the class and function around it, empty at module level.
        start, end: offsets of the expression in the UTF-8 text.
        line, column: its line number, from 1, and its offset in ``code``.
        before, after: its text, and what replaces it.
        code: the text of the line, which identifies the change when lines move.
        at_import: whether it is evaluated when the module is imported.
    """

    path: str
    scope: str
    start: int
    end: int
    line: int
    column: int
    before: str
    after: str
    code: str
    at_import: bool

    @property
    def key(self) -> str:
        return " | ".join((self.path, self.scope, self.code, str(self.column), self.before, self.after))

    def apply(self, source: str) -> str:
        """Text of the changed file."""
        data = source.encode()
        return (data[: self.start] + f"({self.after})".encode() + data[self.end :]).decode()


def changes_of(path: str, source: str) -> list[Change]:
    """Every change of a file, in the order of its text."""
    line_starts = [0]
    for line in source.encode().splitlines(keepends=True):
        line_starts.append(line_starts[-1] + len(line))
    lines = source.splitlines()
    data = source.encode()
    found = []
    for node, scope, at_import in _expressions(ast.parse(source)):
        start = line_starts[node.lineno - 1] + node.col_offset
        end = line_starts[node.end_lineno - 1] + node.end_col_offset
        before = data[start:end].decode()
        code = lines[node.lineno - 1]
        column = node.col_offset - (len(code) - len(code.lstrip()))
        place = (path, scope, start, end, node.lineno, column, before)
        found += [Change(*place, after, code.strip(), at_import) for after in _alternatives(node, before)]
    return sorted(found, key=lambda change: (change.start, change.end, change.after))


def _alternatives(node: ast.expr, before: str) -> Iterator[str]:
    """Texts that may stand in the place of ``node``."""
    if isinstance(node, ast.Constant):
        yield from _other_constants(node.value)
    elif isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for other in _COMPARISONS[type(operator)]:
                operators = [*node.ops[:place], other(), *node.ops[place + 1 :]]
                yield ast.unparse(ast.Compare(node.left, operators, node.comparators))
    elif isinstance(node, ast.BoolOp):
        other = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        yield ast.unparse(ast.BoolOp(other, node.values))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield ast.unparse(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
        if not any(
            isinstance(side, ast.Constant | ast.JoinedStr) and not _is_number(side) for side in _sides(node)
        ):
            yield ast.unparse(ast.BinOp(node.left, _SIGNS[type(node.op)](), node.right))
    elif getattr(node, "is_condition", False):
        yield f"not ({before})"


def _sides(node: ast.BinOp) -> tuple[ast.expr, ast.expr]:
    return node.left, node.right


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def _other_constants(value: object) -> Iterator[str]:
    if isinstance(value, bool):
        yield repr(not value)
    elif isinstance(value, int):
        yield repr(value + 1)
        if value > 0:
            yield repr(value - 1)
    elif isinstance(value, float):
        yield repr(value * 2 if value else 1.0)


def _expressions(tree: ast.Module) -> Iterator[tuple[ast.expr, str, bool]]:
    """Expressions worth changing, with the scope they stand in and whether they run on import."""
    for statement in tree.body:
        if not _is_all(statement):
            yield from _walk(statement, (), True)


def _is_all(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]).startswith("__")


def _walk(node: ast.AST, scope: tuple[str, ...], at_import: bool) -> Iterator[tuple[ast.expr, str, bool]]:
    if _is_talk(node):
        return
    if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert):
        node.test.is_condition = True
    elif isinstance(node, ast.comprehension):
        for test in node.ifs:
            test.is_condition = True
    if isinstance(node, ast.expr):
        yield node, ".".join(scope), at_import
    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    name = getattr(node, "name", None) if function or isinstance(node, ast.ClassDef) else None
    inner = (*scope, name) if name else scope
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "type_params"):
            continue
        inside = inner if field == "body" else scope
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child, inside, at_import and not (function and field == "body"))


def _is_talk(node: ast.AST) -> bool:
    """Whether ``node`` only words something: an error's arguments, a warning, text with values in it."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.pattern):
        return True
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return True
    if not isinstance(node, ast.Call):
        return False
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in _TALKERS or (isinstance(function, ast.Name) and name.endswith(("Error", "Warning")))
