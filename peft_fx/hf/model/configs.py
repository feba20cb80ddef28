"""`peft_config`: one dict for a model's life, of the callers' own config objects, filled in with what was decided.

What adapters are made of and computed with are configs of their own in the engine's state. So an edit here changes no
call, as in PEFT: it is what the next files say; and a name that is taken out is not saved, set or listed.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from ...config import AdapterConfig
from ...engine.filing import filed_config
from ...store.state import State


class Configs(dict[str, AdapterConfig]):
    """Adapter name -> config.

    known: adapter -> (the engine's config, what it says in files) as they were when they were copied into the entry.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, tuple[AdapterConfig, AdapterConfig]] = {}

    def synced(self, state: State) -> Configs:
        """Itself, after what the engine has done since: adapters that came or went, configs that a swap replaced."""
        for name in self.known.keys() - state.recipe.keys():
            del self.known[name]
            self.pop(name, None)
        for name, resident in state.recipe.items():
            if state.gated and resident.name is None:  # a free slot
                self.pop(name, None)
                self.known.pop(name, None)
                continue
            config, before = self.known.get(name, (None, None))
            if config is not resident.config:
                now = filed_config(state, name)
                self.known[name] = resident.config, now
                self.update_entry(name, before, now)
        return self

    def update_entry(self, name: str, before: AdapterConfig | None, now: AdapterConfig) -> None:
        """The fields that differ from `before`, all without one; what was edited besides stays."""
        if before is None or type(before) is not type(now):
            self[name] = copy.deepcopy(now)
        elif name in self:
            for field, value in vars(now).items():
                if value != getattr(before, field):
                    setattr(self[name], field, copy.deepcopy(value))

    def adopt(self, name: str, given: Any) -> None:
        """The caller's object becomes the entry, with the entry's values; one of another class, PEFT's or a dict, does not."""
        if type(given) is type(self[name]):
            vars(given).update(vars(self[name]))
            self[name] = given

    def edited(self, name: str, config: AdapterConfig) -> AdapterConfig:
        """A config for files with what was edited in the entry since it was filled in."""
        entry, before = self[name], self.known[name][1]
        edits = {k: v for k, v in vars(entry).items() if hasattr(before, k) and v != getattr(before, k)}
        return dataclasses.replace(config, **edits) if edits else config
