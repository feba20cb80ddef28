"""The layers of the house: imports go down only, and in no circle."""

import ast
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up; what is on one line may import one another.
LAYERS = (
    {
        "errors",
        "atomic",
        "names",
        "notices",
        "operators",
        "peft_types",
        "progress",
        "suggestions",
        "missing",
        "uploads",
    },
    {"checks", "fields", "config", "config_files", "folding", "target", "kernels", "tables"},
    {"methods", "recipe", "storage"},
    {"planning", "store"},
    {"files"},
    {"passes"},
    {"engine"},
    {"verbs"},
    {"training"},
    {"hf"},
    {"", "__main__", "cli"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted([*(ROOT / "peft_fx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ("peft_fx", *parts) if parts[0] == "passes" else parts


def imported(path: Path):
    """Absolute names of what a file imports from this project, at the top of the file or inside functions."""
    package = module_of(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = (*base, *(node.module or "").split(".")) if node.module else base
            if name[:1] == ("peft_fx",):
                yield name
        elif isinstance(node, ast.Import):
            yield from (tuple(a.name.split(".")) for a in node.names if a.name.split(".")[0] == "peft_fx")


def layer(name: tuple[str, ...]) -> str:
    found = name[1] if len(name) > 1 and name[1] != "__init__" else ""
    assert found in RANK, f"{found!r} is in no layer: put it into LAYERS and docs/architecture.md"
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_from_its_own_layer_and_below(path):
    mine = layer(module_of(path))
    above = [".".join(n) for n in imported(path) if RANK[layer(n)] > RANK[mine]]
    assert not above, f"{path.relative_to(ROOT)} is in layer {mine!r} and imports from above: {above}"


def running(tree: ast.AST):
    """The nodes that run some time."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from running(node)


def test_no_files_import_one_another_in_a_circle():
    """Not inside of functions either; for type checkers alone they may."""
    files = {".".join(module_of(path)).removesuffix(".__init__"): path for path in FILES}
    circles = networkx.DiGraph()
    for name, path in files.items():
        package = module_of(path)[:-1]
        for node in running(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                source = ".".join([*package[: len(package) - node.level + 1], *(node.module or "").split(".")]).rstrip(
                    "."
                )
                for alias in node.names:
                    found = next((n for n in (f"{source}.{alias.name}", source) if n in files), None)
                    if found not in (None, name):
                        circles.add_edge(name, found)
    assert circles.number_of_edges() > len(files)
    assert not [sorted(c) for c in networkx.strongly_connected_components(circles) if len(c) > 1]
