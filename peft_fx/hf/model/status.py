"""What adapters do where: one record per target, and a summary of the model. PEFT's names."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import nn

from ...engine.derive import placements
from ...store.tensors import ADAPTERS, get_tensor
from .tuner import Tuner


@dataclass
class TunerLayerStatus:
    """One adapted module. requires_grad, devices: per adapter."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str] = field(default_factory=dict)
    available_adapters: list[str] = field(default_factory=list)
    devices: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class TunerModelStatus:
    """The model. requires_grad: per adapter, "irregular" where its tensors disagree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def layer_status(tuner: Tuner) -> list[TunerLayerStatus]:
    """A record per adapted module, in the order of adapters and their targets."""
    records: dict[str, TunerLayerStatus] = {}
    grads, devices = defaultdict(list), defaultdict(set)
    for adapter in tuner.names:
        for p in placements(tuner.backend.state, adapter):
            path = p.target.path
            if path not in records:
                kind = type(tuner.model.get_submodule(path)).__name__
                acting = [n for n in tuner.active_adapters if n in tuner.names]
                records[path] = TunerLayerStatus(
                    f"model.{path}", kind, tuner.enabled, acting, list(tuner.merged_adapters)
                )
            for name, spec in p.tensors.items():
                tensor = get_tensor(tuner.backend.adapters, f"{ADAPTERS}.{p.resolve(name).name}")
                devices[path, adapter].add(tensor.device.type)
                if spec.trainable:
                    grads[path, adapter].append(tensor.requires_grad)
            records[path].requires_grad[adapter] = agreed(grads[path, adapter])
            records[path].devices[adapter] = sorted(devices[path, adapter])
            records[path].available_adapters = sorted(records[path].requires_grad)
    return list(records.values())


def model_status(tuner: Tuner, kind: str) -> TunerModelStatus:
    """kind: what to call the class of the model around the tuner."""
    layers = layer_status(tuner)
    trainable, total = parameter_counts(tuner)
    grads, devices = {}, {}
    for adapter in tuner.names:
        grads[adapter] = agreed([r.requires_grad[adapter] for r in layers if adapter in r.requires_grad])
        devices[adapter] = sorted({d for r in layers for d in r.devices.get(adapter, ())})
    return TunerModelStatus(
        base_model_type=type(tuner.model).__name__, adapter_model_type=kind,
        peft_types={n: tuner.peft_config[n].peft_type for n in tuner.names},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers), enabled=tuner.enabled, active_adapters=tuner.active_adapters,
        merged_adapters=list(tuner.merged_adapters), requires_grad=grads, available_adapters=tuner.names,
        devices=devices,
    )  # fmt: skip


def parameter_counts(module: nn.Module) -> tuple[int, int]:
    """(trainable, all)."""
    counts = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


def agreed(values: list) -> bool | str:
    """The common value, "irregular" where there is none."""
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular" if found else False
