"""The layers of the house: imports go down only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up; what is on one line may import one another.
LAYERS = (
    {"errors", "atomic", "inputs", "notices", "operators", "progress", "suggestions", "missing"},
    {"checks", "fields", "config", "folding", "target", "kernels", "lazy", "sharing", "summary", "tables"},
    {"methods", "recipe"},
    {"planning", "resident", "store"},
    {"files"},
    {"passes"},
    {"verbs"},
    {"hf", "training"},
    {"", "cli"},
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
