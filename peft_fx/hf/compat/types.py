"""PEFT's enumerations; their members are strings, equal to what config files hold."""

from __future__ import annotations

from enum import StrEnum

from ...config import TASKS
from ...methods import INTERNAL, METHODS

PeftType = StrEnum("PeftType", {name: name for name in METHODS if name not in INTERNAL})
# What the model is for, which decides the class of `PeftModel` and the heads that are trained with the adapter.
TaskType = StrEnum("TaskType", {name: name for name in TASKS})
