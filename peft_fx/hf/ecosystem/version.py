"""What `importlib.metadata.version("peft")` answers: PEFT's release, or the newer one that an installed package asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, distribution
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from types import ModuleType

from ...missing import PEFT_VERSION

# where packages write which PEFT they take, which their metadata do not say
ASKED = {
    "transformers": ("dependency_versions_table.py", "integrations/peft.py"),
    "diffusers": ("dependency_versions_table.py", "utils/constants.py"),
}
LEAST = re.compile(r"""\bpeft *>= *([\w.]+)|\bMIN_PEFT_VERSION *= *["']([\w.]+)""")


def asked() -> list[str]:
    """The least version of PEFT that each installed package takes; nothing is imported."""
    found = []
    for package, files in ASKED.items():
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            texts = [path.read_text(encoding="utf-8") for f in files if (path := Path(folder, f)).is_file()]
            found += [a or b for text in texts for a, b in LEAST.findall(text)]
    return found


def installed() -> str | None:
    try:
        return distribution("peft").version
    except PackageNotFoundError:
        return None


def answered() -> str:
    return max((installed() or PEFT_VERSION, *asked()), key=release)


def release(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


class Named(Distribution):
    """A distribution `peft` of this version, without files."""

    def __init__(self, version: str):
        self.texts = {"METADATA": f"Metadata-Version: 2.1\nName: peft\nVersion: {version}\n", "top_level.txt": "peft\n"}

    def read_text(self, filename: str) -> str | None:
        return self.texts.get(filename)

    def locate_file(self, path: str | PathLike[str]) -> Path:
        return Path(path)


class Answers(DistributionFinder):
    """An entry of `sys.meta_path` that finds the distribution `peft`, and no module."""

    def __init__(self, version: str):
        self.version = version

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008  as in the base class
    ) -> list[Distribution]:
        return [Named(self.version)] if (context.name or "peft").lower() == "peft" else []
