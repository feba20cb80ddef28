"""`Format`: everything static of a packed weight, as data and as the text that is a literal of our operators.

["bnb4", [576, 192], "float32", {"type": "nf4", "block": 64, "nested": 0}]
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..errors import StorageError


@dataclass(frozen=True)
class Format:
    """scheme: name in `schemes.SCHEMES`. shape, dtype: of the dense weight as a layer would store it. facts: JSON values."""

    scheme: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def text(self) -> str:
        return json.dumps([self.scheme, [*self.shape], str(self.dtype).removeprefix("torch."), self.facts])

    def __getitem__(self, fact: str) -> Any:
        return self.facts[fact]


def parse(text: str) -> Format:
    """The format that a text stands for. Raises StorageError for what is none: texts come from files."""
    try:
        name, shape, dtype, facts = json.loads(text)
        kind = getattr(torch, dtype)
        if isinstance(name, str) and isinstance(kind, torch.dtype) and isinstance(facts, dict):
            return Format(name, tuple(map(int, shape)), kind, facts)
    except (ValueError, TypeError, AttributeError):
        pass
    raise StorageError(
        f"{text[:200]!r} is no format of a packed weight: expected [scheme, shape, dtype, facts] as JSON"
    )
