"""Errors, one class per question a caller may want to answer; all are `PeftFxError`.

Each message names the target or file, what came, what was expected, and the remedy.
"""


class PeftFxError(Exception):
    """Base class of every error this package raises on purpose."""


class CaptureError(PeftFxError, RuntimeError):
    """The model cannot be captured as one FX graph; names the module and the remedy."""


class RecipeError(PeftFxError, ValueError):
    """A config, recipe or selection that cannot be applied to this graph."""


class AdapterFileError(PeftFxError, ValueError):
    """An adapter folder that cannot be read, or does not fit the graph."""


class MergeError(PeftFxError, ValueError):
    """A merge that would be wrong: non-finite result, tied weight, nothing to merge."""


class HotswapError(PeftFxError, ValueError):
    """A swap that cannot be done in place; no tensor has been changed."""


class GraphError(PeftFxError, RuntimeError):
    """A graph that breaks a pass's `requires` or `ensures`, or an operation a captured graph cannot do."""
