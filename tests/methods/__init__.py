"""What is known about each method besides its code, one module of data per method, beside their tests (module name: the peft_type in lower case).

    PEFT        [(options, "subject subject ...")]: cells that PEFT 0.21.2 has and has right
    DEFINED     [(options, "subject ...")]: cells that are compared with `definition` instead
    REFUSED     [(options, "subject ...", "reason")]: combinations without a meaning, and constraints
    definition  (W, b, tensors, options) -> (W', b'): float64, canonical layout (out, in / groups, *kernel), b possibly None;
                tensors: key suffix in the file -> float64 tensor; written from the paper, without peft_fx's code
    TYPE        (optional) the peft_type, of a variant that another method's config chooses
    EXCLUSIVE   (optional) True: the adapter replaces the model's numbers, so that only one can be active
    COPIES      (optional) shared tensors that PEFT writes once more under every module
    ABSENT_FROM_FILE  (optional) names -> function(subject's W) for tensors that files do not hold

Subjects are those of tests/conformance.py; the adapted module is `layer` unless options say otherwise.
"""

from importlib import import_module
from pathlib import Path

NAMES = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith(("__", "test_")))
MODULES = {name.upper(): import_module(f"{__name__}.{name}") for name in NAMES}


def cells(table: str) -> list[tuple]:
    """(method, options, subject, *rest) of one table over all methods."""
    return [
        (name, {"target_modules": ["layer"], **options, "peft_type": getattr(module, "TYPE", name)}, subject, *rest)
        for name, module in MODULES.items()
        for options, subjects, *rest in getattr(module, table, [])
        for subject in subjects.split()
    ]


def label(cell) -> str:
    name, options, subject = cell[:3]
    shown = [f"{k}={v}" for k, v in options.items() if k not in ("peft_type", "target_modules")]
    return "-".join([name, subject, *shown])
