"""What no linter looks for: functions that are there twice, and what nothing uses."""

import ast
import importlib.util
from collections import Counter
from pathlib import Path

import peft_fx
from peft_fx.hf.compat.submodules import SUBMODULES

ROOT = Path(__file__).parent.parent
OURS = ("peft_fx", "passes", "kernels")
LONG = 4  # lines of a body, from which on a second copy is worth a function


def trees(*folders):
    """(path, syntax tree) of every file."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text())


def without_docstring(body: list) -> list:
    first = body[0]
    told = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return body[told:]


class Renamed(ast.NodeTransformer):
    """Arguments and local variables are called by the order in which they occur."""

    def __init__(self, function):
        names = (n.arg if isinstance(n, ast.arg) else n.id for n in ast.walk(function)
                 if isinstance(n, ast.arg) or (isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)))  # fmt: skip
        self.names = {name: f"_{i}" for i, name in enumerate(dict.fromkeys(names))}

    def visit_Name(self, node):
        return ast.Name(self.names.get(node.id, node.id), node.ctx)

    def visit_arg(self, node):
        return ast.arg(self.names[node.arg])


def shape_of(function) -> str:
    """The same for functions that differ in their names, docstrings and annotations at most; renames in place."""
    rename = Renamed(function)
    return "".join(ast.dump(rename.visit(node)) for node in (function.args, *without_docstring(function.body)))


def lines_of(function) -> int:
    body = without_docstring(function.body)
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


ALIKE = """
def first(x, more): total = sum(x); return [total for _ in more]
def second(y: list, z) -> list: "Says something."; s = sum(y); return [s for _ in z]
def third(x, more): total = max(x); return [total for _ in more]
"""


def test_functions_are_alike_up_to_their_own_names():
    first, second, third = map(shape_of, ast.parse(ALIKE).body)
    assert first == second != third


def test_no_function_is_there_twice():
    found = {}
    for path, tree in trees(*OURS):
        for node in reversed(list(ast.walk(tree))):  # a function within another first
            if isinstance(node, ast.FunctionDef) and lines_of(node) >= LONG:
                found.setdefault(shape_of(node), []).append(f"{path}:{node.lineno} {node.name}")
    assert len(found) > 500
    assert not [places for places in found.values() if len(places) > 1]


def names_read(tree) -> Counter:
    """Names as such, which are the file's own or imported."""
    return Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))


def names_asked_for(tree) -> set[str]:
    """What a file takes from others: by import, as an attribute, or as text, as tables of names have it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update(part for part in node.value.split(".") if part.isidentifier())
    return found


WRAPPERS = {"dataclass", "cache", "lru_cache", "contextmanager", "total_ordering"}  # other decorators use what they get


def used_by_decorator(node) -> bool:
    names = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    return not {ast.unparse(n).rpartition(".")[2] for n in names} <= WRAPPERS


def names_of_peft(module: str) -> set[str]:
    """What users import from a module of PEFT's, and by the same path from ours."""
    name = module if module == "peft" else f"peft.{module}"
    return set(vars(importlib.import_module(name))) if importlib.util.find_spec(name) else set()


def test_nothing_is_unused():
    """Top-level functions and classes, but for the package's public names, PEFT's, and what pytest finds by name."""
    files = list(trees(*OURS, "tests", "tools", "examples"))
    pefts = {name for module in ("peft", *SUBMODULES) for name in names_of_peft(module)}
    asked = pefts.union(*(names_asked_for(tree) for _, tree in files), peft_fx.__all__)
    unused = []
    for path, tree in files:
        here = names_read(tree)
        if "globals" in here:  # scripts whose functions are chosen by name
            continue
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or used_by_decorator(node) or node.name in asked:
                continue
            if here[node.name] == names_read(node)[node.name] and not node.name.startswith(
                ("test_", "Test", "pytest_")
            ):
                unused.append(f"{path}:{node.lineno} {node.name}")
    assert not unused
