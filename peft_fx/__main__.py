"""`python -m peft_fx script.py ...`, or `-m module ...`: a script that imports `peft`, run on peft_fx as it stands."""

from __future__ import annotations

import os
import runpy
import sys

from .hf.ecosystem.as_peft import as_peft


def main() -> None:
    match sys.argv[1:]:
        case ["-m", module, *arguments]:
            as_peft()
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *arguments] if not script.startswith("-"):
            as_peft()
            sys.argv = [script, *arguments]
            sys.path[0] = os.path.dirname(os.path.abspath(script))
            runpy.run_path(script, run_name="__main__")
        case _:
            sys.exit(
                "usage: python -m peft_fx SCRIPT [ARGUMENTS], or -m MODULE [ARGUMENTS]: runs it with peft_fx in PEFT's place"
            )


main()
