"""How transformers' checkpoints called the modules of a model otherwise, as plain data.

transformers renames modules and reads older checkpoints through regexes: a list per model type or class, which a model inside
another one has for the names behind its own. Only those that rename are taken; those that also compute are not for adapters.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from ..target import Renaming

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN = ("WeightRenaming", "PrefixChange")  # classes of rules; those derived from them keep a state, or count


def renamings(model: nn.Module) -> tuple[Renaming, ...]:
    """() for models that are not transformers'."""
    if not any(c.__name__ == "PreTrainedModel" for c in type(model).__mro__):
        return ()
    from transformers.conversion_mapping import get_model_conversion_mapping

    own = getattr(model, "_checkpoint_conversion_mapping", None) or {}  # of a model whose code is not transformers'
    rules = get_model_conversion_mapping(cast("PreTrainedModel", model), add_legacy=False)
    plain = (from_rule(rule) for rule in rules if type(rule).__name__ in PLAIN)
    return (*(Renaming(old, new) for old, new in own.items()), *plain)


def from_rule(rule: Any) -> Renaming:
    """transformers' `\\1` is the first group inside of the pattern that matched; groups that did not are empty."""
    inner = "".join(rf"\{number + 1}" for number in rule.compiled_sources.groupindex.values())
    to = re.sub(r"\\(?!\d)", "", rule.target_patterns[0]).replace(r"\1", inner)
    return Renaming(rule.compiled_sources.pattern, to, scopes(rule))


def scopes(rule: Any) -> tuple[str, ...]:
    """A model inside another is behind its path; the outer model's own prefix may be missing there."""
    if getattr(rule, "scope_prefix", None) is None:
        return ("",)
    outer, own = (f"{name}." if name else "" for name in (rule.base_model_prefix, rule.scope_prefix))
    return (outer + own, own)
