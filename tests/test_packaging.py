"""The packages are where setup.cfg says, and hide no one else's."""

import configparser
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
PACKAGES = SETUP["options"]["packages"].split()


def python(code: str) -> str:
    """`python -c` from the repository root puts that folder first on sys.path, as `python -m pytest` does."""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.skipif(
    not importlib.metadata.packages_distributions().get("kernels"), reason="Hugging Face's kernels is not installed"
)
@pytest.mark.parametrize("first", ["import sys", "import peft_fx.kernels, sys"], ids=["alone", "after ours"])
def test_kernels_is_hugging_faces_from_the_repository_root(first):
    file = python(f"{first}; assert sys.path[0] == ''; import kernels; kernels.get_kernel; print(kernels.__file__)")
    assert ROOT / "kernels" not in Path(file).parents


def test_every_package_imports_from_the_repository_root():
    assert python(f"import {', '.join(PACKAGES)}, sys; print(*sorted(set({PACKAGES}) & set(sys.modules)))") == " ".join(
        sorted(PACKAGES)
    )


def test_our_kernels_are_the_folder_of_that_name():
    (folder,) = python("import peft_fx.kernels; print(*peft_fx.kernels.__path__)").splitlines()
    assert Path(folder) == ROOT / "kernels"


def test_our_kernels_folder_has_no_init():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_setup_lists_every_folder_that_holds_modules():
    on_disk = set()
    for package, folder in {"peft_fx": "peft_fx", "peft_fx.passes": "passes", "peft_fx.kernels": "kernels"}.items():
        for file in (ROOT / folder).rglob("*.py"):
            on_disk.add(".".join([package, *file.parent.relative_to(ROOT / folder).parts]))
    missing = sorted(on_disk - set(PACKAGES))
    assert not missing, "add these to `packages` in setup.cfg, or wheels will lack them"


def test_version_and_command_are_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert importlib.metadata.version("peft-fx") == project["version"]
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="peft-fx")
    assert command.value == "peft_fx.cli:main"
