"""What adapters do where: one record per adapted module, and a summary of the model. PEFT's names and values."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ...errors import NoAdaptersError
from ...methods import METHODS
from ...planning.plan import Placement
from ...store.tensors import ADAPTERS, tensor_of
from .tuner import Tuner

IRREGULAR = "irregular"
# what PEFT calls the layer of a method, by operator kind; of what trains whole modules or rows, by method
LAYERS = {
    "linear": "Linear", "conv1d": "Conv1d", "conv2d": "Conv2d", "conv3d": "Conv3d", "embedding": "Embedding",
}  # fmt: skip
# what comes before that, where it is not the method's file
BEFORE = {
    "ADALORA": "adalora.SVD", "BEFT": "", "C3A": "c3a.C3A", "DEFT": "deft.Deft", "DELORA": "delora.Delora",
    "FOURIERFT": "fourierft.FourierFT", "GLORA": "glora.Glora", "HRA": "hra.HRA", "IA3": "", "MISS": "miss.Miss",
    "SUPERTUNING": "", "UNILORA": "", "WAVEFT": "waveft.WaveFT",
}  # fmt: skip
WRAPPERS = {
    "LN_TUNING": "ln_tuning.LNTuningLayer", "SAVED": "ModulesToSaveWrapper", "TOKENS": "TrainableTokensLayer",
    "TRAINABLE_TOKENS": "TrainableTokensLayer",
}  # fmt: skip
INSIDE = {"TOKENS": ".token_adapter"}  # where in the module that layer is


@dataclass
class TunerLayerStatus:
    """One adapted module. requires_grad, devices: per adapter, "irregular" where its tensors disagree."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str] = field(default_factory=dict)
    available_adapters: list[str] = field(default_factory=list)
    devices: dict[str, list[str]] = field(default_factory=dict)
    quantization_backend: str | None = None


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
    quantization_backend: str | None = None


def layer_status(tuner: Tuner) -> list[TunerLayerStatus]:
    """A record per adapted module, in the model's order. Raises NoAdaptersError where there is none."""
    found: dict[tuple[str, str], dict[str, list[Placement]]] = {}
    for adapter in tuner.names:
        for p in tuner.state.recipe[adapter].placements:
            name = f"model.{p.target.file_path}".rstrip(".") + INSIDE.get(p.method, "")
            found.setdefault((p.target.path, name), {}).setdefault(adapter, []).append(p)
    if not found:
        raise NoAdaptersError("no adapter is on any module: get_peft_model or add_adapter put one there")
    order = {record.path: i for i, record in enumerate(tuner.backend.state.table.records)}
    return [record_of(tuner, name, found[path, name]) for path, name in sorted(found, key=lambda k: order[k[0]])]


def record_of(tuner: Tuner, name: str, by_adapter: dict[str, list[Placement]]) -> TunerLayerStatus:
    """What adapters do at one module."""
    first = next(iter(by_adapter.values()))[0]
    merged = [adapter for adapter in tuner.merged_adapters if adapter in by_adapter]
    record = TunerLayerStatus(name, layer_type(tuner, first), tuner.enabled, list(tuner.active_adapters), merged)
    record.available_adapters = sorted(by_adapter)
    for adapter, chosen in by_adapter.items():
        tensors = [
            (spec, tensor_of(tuner.backend.adapters, f"{ADAPTERS}.{p.resolve(tensor).name}"))
            for p in chosen
            for tensor, spec in p.tensors.items()
        ]
        record.requires_grad[adapter] = agreed([t.requires_grad for spec, t in tensors if spec.trainable])
        record.devices[adapter] = sorted({t.device.type for _, t in tensors})
    return record


def layer_type(tuner: Tuner, p: Placement) -> str:
    """What PEFT's layer at a target is called, e.g. "lora.Linear"."""
    if p.method in WRAPPERS:
        return WRAPPERS[p.method]
    target, method, attention = p.target, str(p.config.peft_type), "MultiheadAttention"
    kind = LAYERS.get(target.kind, target.kind.capitalize())
    kind = attention if tuner.backend.state.table[target.path].is_a(attention) else kind
    entry = METHODS[method]
    before = BEFORE.get(method, f"{entry.__name__ if isinstance(entry, type) else entry[0]}.")
    return before + ("ParamWrapper" if target.by_parameter else kind)


def model_status(tuner: Tuner, base: str, kind: str) -> TunerModelStatus:
    """base, kind: what to call the classes of the model and of what holds its adapters."""
    layers = layer_status(tuner)
    trainable, total = parameter_counts(tuner)
    grads, devices = {}, {}
    for adapter in tuner.names:
        grads[adapter] = agreed([r.requires_grad[adapter] for r in layers if adapter in r.requires_grad])
        devices[adapter] = sorted({d for r in layers for d in r.devices.get(adapter, ())})
    return TunerModelStatus(
        base_model_type=base, adapter_model_type=kind,
        peft_types={n: str(tuner.peft_config[n].peft_type) for n in tuner.names},
        trainable_params=trainable, total_params=total, num_adapter_layers=len(layers), enabled=tuner.enabled,
        active_adapters=list(tuner.active_adapters), merged_adapters=sorted(tuner.merged_adapters), requires_grad=grads,
        available_adapters=sorted(tuner.names), devices=devices,
    )  # fmt: skip


def parameter_counts(module: nn.Module) -> tuple[int, int]:
    """(trainable, all)."""
    counts = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


def agreed(values: list) -> bool | str:
    """The common value, "irregular" where there is none."""
    found = set(values)
    return found.pop() if len(found) == 1 else IRREGULAR if found else False
