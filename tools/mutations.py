"""Small changes to Python code, each of which a test should notice: found in a syntax tree, written into the text.

A mutant is one expression or statement put in place of another. What only speaks is left as it is: docstrings,
annotations and names of types, decorators (the declarations of methods), the texts of errors, and TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

COMPARED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}  # fmt: skip
SILENT = ("annotation", "returns", "decorator_list", "type_params", "bases", "format_spec")
"""Fields of a syntax tree that hold nothing that is computed in a test."""
DROPPED = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.BitOr)
"""Operators whose right side may be left out: a gain, a mean, a bias, a scale, part of a mapping."""
NAMED = {"min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin"}
METHODS = ("transpose", "abs", "sqrt", "clamp", "sort", "exp", "log_softmax", "softmax", "cumsum", "flip", "movedim")
"""Methods whose call may be left out."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        file: path below the repository.
        line: of the code that changes.
        lines: (first, last) of the statement that holds it; of a compound one, of its head.
        kind: of change, by name.
        before, after: the code.
        start, stop: offsets in the file's text of what is replaced.
    """

    file: str
    line: int
    lines: tuple[int, int]
    kind: str
    before: str
    after: str
    start: int
    stop: int

    def applied(self, text: str) -> str:
        """The text of the file with the change."""
        return text[: self.start] + self.after + text[self.stop :]

    def key(self, text: str) -> str:
        """Names this change of this text, wherever in the file it may come to stand."""
        return hashlib.sha256(f"{self.file}\0{self.applied(text)}".encode()).hexdigest()[:16]


def mutants(file: str, text: str) -> list[Mutant]:
    """All mutants of one file, in the order of its text."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    raw = text.encode()

    def offset(line: int, column: int) -> int:
        return len(raw[: starts[line - 1] + column].decode())

    found: dict[tuple[int, int, str], Mutant] = {}
    for node, lines in _code(ast.parse(text), (1, 1)):
        changes = [] if isinstance(node, ast.If | ast.While) else _changes(node)
        if isinstance(node, ast.If | ast.While):  # of the whole statement only its condition is written anew
            node, changes = node.test, [("condition", ast.UnaryOp(ast.Not(), node.test))]
        start = offset(node.lineno, node.col_offset)
        stop = offset(node.end_lineno or node.lineno, node.end_col_offset or 0)
        for kind, other in changes:
            if isinstance(other, ast.AST) and ast.dump(other) == ast.dump(node):
                continue
            after = other if isinstance(other, str) else ast.unparse(other)
            after = f"({after})" if isinstance(node, ast.expr) and not isinstance(node, ast.Constant) else after
            one = Mutant(file, node.lineno, lines, kind, text[start:stop], after, start, stop)
            found.setdefault((start, stop, after), one)
    return sorted(found.values(), key=lambda m: (m.start, m.stop, m.after))


def _code(node: ast.AST, lines: tuple[int, int]) -> Iterator[tuple[ast.expr | ast.stmt, tuple[int, int]]]:
    """The expressions and statements that compute, not those that only speak, and the lines of each one's statement."""
    for field, value in ast.iter_fields(node):
        if field in SILENT:
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _only_speaks(child):
                continue
            own = _head(child) if isinstance(child, ast.stmt) else lines
            if isinstance(child, ast.expr | ast.stmt):
                yield child, own
            if not (isinstance(child, ast.UnaryOp) and isinstance(child.operand, ast.Constant)):
                yield from _code(child, own)


def _head(statement: ast.stmt) -> tuple[int, int]:
    """The first and last line of a statement without its body."""
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if body else statement.end_lineno
    return statement.lineno, max(statement.lineno, last or 0)


def _only_speaks(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.Assert | ast.JoinedStr):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("error", "cast", "TypeVar", "Column", "Source")
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    names = (
        [target.id for target in node.targets if isinstance(target, ast.Name)] if isinstance(node, ast.Assign) else []
    )
    return any(re.match("_?[A-Z][a-z]", name) for name in names)  # a type of its own


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST | str]]:
    """What may stand in place of a node, with the name of each kind of change."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in COMPARED[type(op)]:
                yield "comparison", _with(node, ops=[other() if i == j else x for j, x in enumerate(node.ops)])
    elif isinstance(node, ast.BinOp):
        yield from _of_sum(node)
    elif isinstance(node, ast.UnaryOp):
        if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            yield from (("constant", _with(node, operand=other)) for _, other in _of_constant(node.operand))
        if isinstance(node.op, ast.USub | ast.Not | ast.Invert):
            yield "sign" if isinstance(node.op, ast.USub) else "negation", node.operand
    elif isinstance(node, ast.BoolOp):
        yield "and or", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.IfExp):
        yield "condition", _with(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.Constant):
        yield from _of_constant(node)
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        yield from _of_slice(node)
    elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT") and isinstance(node.ctx, ast.Load):
        yield "transpose", node.value
    elif isinstance(node, ast.Call):
        yield from _of_call(node)
    elif isinstance(node, ast.Tuple | ast.List):
        yield from _of_items(node)
    elif isinstance(node, ast.Dict):
        yield from _of_table(node)
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield "statement", "pass"


def _with(node: ast.AST, **fields: object) -> ast.AST:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def _of_sum(node: ast.BinOp) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
        return
    if type(node.op) in COMPUTED:
        yield "arithmetic", _with(node, op=COMPUTED[type(node.op)]())
    if isinstance(node.op, DROPPED):
        yield "part left out", node.left
    if isinstance(node.op, ast.BitAnd | ast.BitOr):
        yield "and or", _with(node, op=ast.BitOr() if isinstance(node.op, ast.BitAnd) else ast.BitAnd())


def _of_constant(node: ast.Constant) -> Iterator[tuple[str, ast.AST]]:
    value = node.value
    if isinstance(value, bool):
        yield "constant", ast.Constant(not value)
    elif isinstance(value, int):
        yield "constant", ast.Constant(value + 1)
        if value > 0:
            yield "constant", ast.Constant(value - 1)
    elif isinstance(value, float):
        yield "constant", ast.Constant(value / 2 if value else 1.0)


def _of_slice(node: ast.Subscript) -> Iterator[tuple[str, ast.AST]]:
    for place, part in enumerate(node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]):
        if not isinstance(part, ast.Slice):
            continue
        others = []
        if part.lower is not None:
            others.append(_with(part, lower=None))
        if part.upper is not None:
            others.append(_with(part, upper=None))
        if part.step is not None:
            others.append(_with(part, step=None))
        for other in others:
            whole = other
            if isinstance(node.slice, ast.Tuple):
                elts = [other if i == place else x for i, x in enumerate(node.slice.elts)]
                whole = ast.Tuple(elts, ast.Load())
            yield "slice", _with(node, slice=whole)
    if isinstance(node.slice, ast.Slice) and node.slice.step is None:
        yield "reversed", ast.parse(f"({ast.unparse(node)})[::-1]", mode="eval").body


def _of_call(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    for i, (one, two) in enumerate(zip(node.args, node.args[1:], strict=False)):
        plain = isinstance(one, ast.Name | ast.Attribute | ast.Constant | ast.Subscript)
        if type(one) is type(two) and plain and not {ast.unparse(one), ast.unparse(two)} & {"self", "model"}:
            yield "arguments", _with(node, args=[*node.args[:i], two, one, *node.args[i + 2 :]])
    if name in NAMED:
        func = _with(node.func, **{"attr" if isinstance(node.func, ast.Attribute) else "id": NAMED[name]})
        yield "least most", _with(node, func=func)
    if name in METHODS and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) != "torch":
        yield "call left out", node.func.value
    for i, keyword in enumerate(node.keywords):
        if keyword.arg in ("dim", "axis") and ast.unparse(keyword.value) in ("-1", "0", "1"):
            other = ast.Constant(1 if ast.unparse(keyword.value) == "0" else 0)
            changed = ast.keyword(keyword.arg, other)
            yield "axis", _with(node, keywords=[changed if i == j else k for j, k in enumerate(node.keywords)])


def _of_items(node: ast.Tuple | ast.List) -> Iterator[tuple[str, ast.AST]]:
    if len(node.elts) > 1 and not any(isinstance(x, ast.Starred | ast.Slice) for x in node.elts):
        yield "order", _with(node, elts=[node.elts[1], node.elts[0], *node.elts[2:]])


def _of_table(node: ast.Dict) -> Iterator[tuple[str, ast.AST]]:
    """Values of neighbouring keys, exchanged: a table of sites, permuted."""
    for i in range(len(node.values) - 1):
        if node.keys[i] is None or node.keys[i + 1] is None:
            continue
        swapped = [*node.values[:i], node.values[i + 1], node.values[i], *node.values[i + 2 :]]
        yield "order", _with(node, values=swapped)
