"""From a model to its base graph: `capture`."""

from .capture import capture

__all__ = ["capture"]
