"""The house: functions that fit a screen, their shapes, and one rule for ``__all__``."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import ROOT
from surface import PUBLIC

LONGEST = 60  # lines of code of a function
FILE = 300  # lines of a file
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
FILES = sorted(path for room in ("ssah", "ssah_kernels") for path in (ROOT / room).rglob("*.py"))
SHAPE = re.compile(r"(?<!\w)\[[\w .,*+/()-]*\]|\bany shapes?\b")
TENSOR = re.compile(r"\b(Tensor|Parameter)\b")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that have code: no blank line, comment or docstring."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        # A string that is a statement of its own: it does nothing.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return found


def lengths(source: str, *, over: int = 0) -> Iterator[tuple[str, int]]:
    """Each function, also inside others, with its lines of code, if over so many.

    The signature counts.
    """
    spans = [
        (node.name, range(node.lineno, (node.end_lineno or 0) + 1))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, Function)
    ]
    # Few functions are long even with their comments: only their files are read token by token.
    if any(len(span) > over for _, span in spans):
        lines = code_lines(source)
        found = ((name, len(lines & set(span))) for name, span in spans)
        yield from ((name, length) for name, length in found if length > over)


def test_lines_of_code_are_counted() -> None:
    source = (
        "def f(\n"
        "    x,\n"
        "):\n"
        '    """What it does.\n'
        "\n"
        '    And more."""\n'
        "    # why\n"
        "\n"
        '    text = """two\n'
        'lines"""\n'
        "    def g(): return x  # twice as long\n"
        "    return g\n"
    )
    assert list(lengths(source)) == [("f", 7), ("g", 1)]


def test_a_function_fits_a_screen() -> None:
    long = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        for name, _ in lengths(path.read_text(encoding="utf-8"), over=LONGEST)
    }
    assert not long, f"over {LONGEST} lines of code: cut into plan, run and finish"


def test_a_file_has_one_idea() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in FILES
        if (lines := path.read_text(encoding="utf-8").count("\n")) > FILE
    }
    assert not long, f"over {FILE} lines: split by idea"


def exported(path: Path) -> list[str]:
    """Public names that a package gives: its functions and classes, and names of its files."""
    package = ".".join(path.parent.relative_to(ROOT).parts)
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom) and (
            node.level == 1 or f"{node.module}.".startswith(f"{package}.")
        ):
            names += [alias.asname or alias.name for alias in node.names]
    return [name for name in names if not name.startswith("_")]


def lists_names(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.Name) and node.id == "__all__" for node in ast.walk(tree))


@pytest.mark.parametrize("room", ["ssah", "ssah_kernels"])
def test_all_stands_where_names_are_given_out(room: str) -> None:
    """In the ``__init__`` of a package and in public modules; what a file has, its text says."""
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] == room]
    public = {ROOT / Path(*module.split(".")).with_suffix(".py") for module in PUBLIC}
    gives = {
        path for path in files if path in public or (path.name == "__init__.py" and exported(path))
    }
    have = {path for path in files if lists_names(path)}
    assert not {str(path.relative_to(ROOT)) for path in gives - have}, "__all__ is missing"
    assert not {str(path.relative_to(ROOT)) for path in have - gives}, "take __all__ out"


def public_functions(
    body: list[ast.stmt], owner: ast.ClassDef | None = None
) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Functions and methods without underscore, each with its docstring; a class's is __init__'s.

    A method without one overrides another's, which is looked at there.
    """
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, node)
        elif isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node)
            if owner is not None and (node.name == "__init__" or not (doc or owner.bases)):
                doc = f"{ast.get_docstring(owner)}\n{doc}"
            if doc is not None and (node.name == "__init__" or not node.name.startswith("_")):
                yield node, doc


def takes_tensors(function: ast.FunctionDef) -> bool:
    """Whether a tensor is in the signature, given or returned."""
    given = function.args
    every = [each.annotation for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    written = [ast.unparse(each) for each in (*every, function.returns) if each is not None]
    return any(TENSOR.search(each) for each in written)


def without_shape(source: str) -> list[str]:
    """Public functions with a tensor in their signature that say no shape."""
    lines, found = source.splitlines(), []
    for function, doc in public_functions(ast.parse(source).body):
        signature = "\n".join(lines[function.lineno - 1 : function.body[0].lineno - 1])
        comments = " ".join(re.findall(r"#.*", signature))
        if takes_tensors(function) and not SHAPE.search(doc) and not SHAPE.search(comments):
            found.append(function.name)
    return found


def test_a_shape_is_found() -> None:
    source = """
def a(x: Tensor):
    "Sums of ``[rows, units]``."
def b(x: Tensor):
    "A ``list[int]``."
def c(
    x: Tensor,  # [units]
):
    "Sums."
def d() -> dict[str, Tensor]:
    "Sums."
def e(x: int):
    "Sums."
class F:
    "Of ``[n]``."
    def __init__(self, x: Tensor):
        self.x = x
    def g(self, x: Tensor):
        "Sums."
"""
    assert without_shape(source) == ["b", "d", "g"]


def test_shapes_stand_where_tensors_are_taken() -> None:
    """In the library, and in the operators and optimisers that users call."""
    kernels = {ROOT / "ssah_kernels" / "ops.py", *(ROOT / "ssah_kernels" / "optim").glob("*.py")}
    lacking = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        if path.is_relative_to(ROOT / "ssah") or path in kernels
        for name in without_shape(path.read_text(encoding="utf-8"))
    }
    assert not lacking, "say the shapes, e.g. ``[tokens, units]``, in the docstring"


def raised(function: ast.AST) -> Iterator[str]:
    """Names of the errors that a function itself raises, and no function inside it."""
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield ast.unparse(node.exc.func).rpartition(".")[2]
        elif not isinstance(node, Function | ast.Lambda):
            yield from raised(node)


def untold_errors(source: str) -> list[str]:
    """Public functions with errors that their docstring does not name."""
    return [
        f"{function.name} {name}"
        for function, doc in public_functions(ast.parse(source).body)
        for name in sorted(set(raised(function)))
        if name.endswith("Error")
        and name not in doc
        and "errors as of" not in " ".join(doc.split())
    ]


def test_an_untold_error_is_found() -> None:
    source = """
def a(x):
    "``[n]``. ValueError for 0."
    if not x:
        raise ValueError("x is 0")
    raise TypeError("x is no number")
def b(x):
    "Arguments and errors as of `a`."
    raise ValueError("x is 0")
def c(x):
    "Twice."
    def inside():
        raise ValueError("x is 0")
    return inside
"""
    assert untold_errors(source) == ["a TypeError"]


def test_errors_are_told_where_they_are_raised() -> None:
    """Those that a function raises itself: what it calls has a docstring of its own."""
    operators = ROOT / "ssah_kernels" / "ops.py"
    untold = {
        f"{path.relative_to(ROOT)}: {each}"
        for path in FILES
        if path.is_relative_to(ROOT / "ssah") or path.parent.name == "optim" or path == operators
        for each in untold_errors(path.read_text(encoding="utf-8"))
    }
    assert not untold, "name the error in the docstring, under Raises"
