"""Misuse of PEFT's names, one module of rows per subject. What a row is, and how it is tried: tests/misuse.py."""

from . import configs, files, models

MODULES = {"configs": configs, "files": files, "models": models}


def rows(table: str) -> dict[str, tuple]:
    """Rows of one table over all subjects, by subject and id."""
    return {
        f"{name}: {row}": found for name, module in MODULES.items() for row, found in getattr(module, table).items()
    }
