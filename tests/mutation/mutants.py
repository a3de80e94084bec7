"""Small wrong changes to a Python file, one at a time."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.MatMult: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One changed expression of a file.

    Attributes:
        line: Where it stands, from 1.
        column: Likewise, from 0.
        end: Line and column behind it.
        was: The source of before.
        now: What stands there instead.
    """

    line: int
    column: int
    end: tuple[int, int]
    was: str
    now: str

    def apply(self, source: str) -> str:
        """The whole file with the change in it."""
        lines = source.encode().splitlines(keepends=True)
        first, last = self.line - 1, self.end[0] - 1
        head, tail = lines[first][: self.column], lines[last][self.end[1] :]
        lines[first : last + 1] = [head + f"({self.now})".encode() + tail]
        return b"".join(lines).decode()


def mutants(source: str) -> list[Mutant]:
    """All mutants of a file in the order of its lines.

    Left out are text, types and decorators, what is raised, and kernels that only run on a device.
    """
    found = []
    for node in _expressions(ast.parse(source)):
        for changed in _changes(node):
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            was, now = ast.get_source_segment(source, node) or "", ast.unparse(changed)
            end = (node.end_lineno, node.end_col_offset)
            found.append(Mutant(node.lineno, node.col_offset, end, was, now))
    return sorted(found, key=lambda mutant: (mutant.line, mutant.column, mutant.now))


def sample(files: Mapping[str, str], count: int, *, seed: int) -> list[tuple[str, Mutant]]:
    """Some mutants of some files: at least one of each file that has any, the rest from all alike.

    Args:
        files: Sources by path.
        count: How many.
        seed: Of the choice.
    """
    choose = random.Random(seed)
    every = {path: mutants(source) for path, source in files.items()}
    first = [(path, choose.choice(known)) for path, known in every.items() if known]
    rest = [(path, one) for path, known in every.items() for one in known if (path, one) not in first]
    chosen = first[:count] + choose.sample(rest, max(min(count - len(first), len(rest)), 0))
    choose.shuffle(chosen)
    return chosen


def _expressions(node: ast.AST) -> Iterator[ast.expr]:
    """Expressions that decide what a program does."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.expr):
        yield node
    if isinstance(node, ast.FunctionDef) and any("triton" in ast.unparse(one) for one in node.decorator_list):
        return
    skipped = {"annotation", "returns", "decorator_list", "type_params"}
    for name, value in ast.iter_fields(node):
        if name not in skipped:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _expressions(child)


def _changes(node: ast.expr) -> Iterator[ast.expr]:
    match node:
        case ast.Compare(left, [operator], [right]):
            if type(operator) in _COMPARISONS:
                yield ast.Compare(left, [_COMPARISONS[type(operator)]()], [right])
        case ast.BinOp(left, operator, right):
            if type(operator) in _OPERATORS and not _is_text(left) and not _is_text(right):
                yield ast.BinOp(left, _OPERATORS[type(operator)](), right)
        case ast.BoolOp(ast.And(), values):
            yield ast.BoolOp(ast.Or(), values)
        case ast.BoolOp(ast.Or(), values):
            yield ast.BoolOp(ast.And(), values)
        case ast.UnaryOp(ast.Not(), operand) | ast.UnaryOp(ast.USub(), operand):
            yield operand
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() as value):
            yield ast.Constant(value + 1)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
