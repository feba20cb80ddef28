"""Errors, one class per question a caller may want to answer; all are `PeftFxError`.

Each message names the target or file, what came, what was expected, and the remedy. Each class is also what PEFT raises in
such a place, so that the `except` of a script that was written for PEFT catches it.
"""


class PeftFxError(Exception):
    """Base class of every error this package raises on purpose."""


class CaptureError(PeftFxError, RuntimeError):
    """The model cannot be captured as one FX graph; names the module and the remedy."""


class GraphError(PeftFxError, RuntimeError):
    """A graph that breaks a pass's `requires` or `ensures`, or an operation a captured graph cannot do."""


class StorageError(PeftFxError, ValueError, NotImplementedError):
    """A packed weight that cannot be read, or be kept in its scheme; names the layer or scheme and the remedy."""


class RecipeError(PeftFxError, ValueError):
    """A config, recipe or selection that cannot be applied to this graph."""


class NothingToAdaptError(RecipeError):
    """A config that matches nothing; PEFT's NoMatchingPeftModuleError."""


class TargetError(RecipeError, TypeError, NotImplementedError):
    """A target that the method cannot adapt."""


class WrongTypeError(RecipeError, TypeError):
    """A value of a type that its field cannot have."""


class UnknownFieldError(RecipeError, TypeError):
    """A field that a config does not have."""


class UnsupportedError(RecipeError, NotImplementedError):
    """A choice that there is not."""


class UnknownMethodError(RecipeError, KeyError):
    """A peft_type that there is not, or none."""

    __str__ = Exception.__str__  # KeyError's would quote the message


class AdapterNameError(RecipeError, GraphError, KeyError):
    """A name that no adapter has, or that none can have."""

    __str__ = Exception.__str__


class NoAdaptersError(PeftFxError, TypeError, ValueError, AttributeError):
    """A model without adapters where one with some is expected."""


class NotAFolderError(PeftFxError, ValueError, AssertionError, FileExistsError):
    """A file where a folder is to be written."""


class AdapterFileError(PeftFxError, ValueError, RuntimeError):
    """An adapter folder that cannot be read, or does not fit the graph."""


class NotAConfigError(AdapterFileError, TypeError):
    """JSON that is no adapter's config."""


class MergeError(PeftFxError, ValueError):
    """A merge that would be wrong: non-finite result, tied weight, nothing to merge."""


class HotswapError(PeftFxError, ValueError, RuntimeError):
    """A swap that cannot be done in place; no tensor has been changed."""


class ImportOrderError(PeftFxError, ImportError):
    """`as_peft` after the import of what has gone without PEFT."""


class UnmatchedWarning(UserWarning, RuntimeWarning):
    """An entry of a config that matches nothing, beside others that do."""
