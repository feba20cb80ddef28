"""`capture`: model -> base graph in the dialect that every pass expects.

The model is exported in eval mode and, unless it provably computes the same there, in train mode; the two captures are
compared, and what differs in a literal only follows `train()` / `eval()` afterwards. The graph module owns containers named
like the model's modules that hold the model's own Parameter objects: nothing is copied, `state_dict` has the model's names, a
tie stays a tie.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ...errors import CaptureError, GraphError
from ...passes.capture.checks import DropWeightChecks
from ...passes.capture.inline import InlineGradRegions
from ...passes.capture.inputs import CheckInputs
from ...passes.capture.linearise import Linearise
from ...passes.capture.literals import MarkDevice, MarkModes, lock
from ...passes.capture.names import NameParameters
from ...passes.core.base import run
from ...passes.match.readers import DEQUANTIZE, observed_kinds, packed_name
from ...planning.modules import module_table
from ...progress import step, working
from ...storage.packed import SUFFIX, Packed
from ...storage.schemes import read
from ...storage.twins import opened
from ...store.lazy import copy_graph
from ...store.modules import ByDevice, ByMode, Store, build, set_graph
from ...store.resident import Adapters
from ...store.state import BaseGraph, State
from ...store.tensors import ROOT, get_tensor, owner_of, set_tensor, store_of
from ...target import ModuleRecord, ModuleTable
from .examples import example_inputs, is_hugging_face, refuse_no_call
from .ones import wider
from .program import program_table, retie
from .proof import modes_agree, refuse_difference
from .stamp import TRACED, equal_lists, shortened, stamp_layers
from .trace import auto_shapes, export_in_mode, separate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGGER = logging.getLogger("peft_fx")


def capture(
    model: nn.Module | ExportedProgram,
    args: tuple = (),
    kwargs: dict | None = None,
    *,
    dynamic_shapes: Any = "auto",
    stamp: bool = True,
) -> fx.GraphModule:
    """Captures a model as an FX graph in the ATen dialect that shares the model's parameters.

    model: an nn.Module (a Hugging Face model needs no example inputs: they are built from its config), a GraphModule from
        `fx.symbolic_trace`, or an ExportedProgram.
    args, kwargs: example inputs of one call. They fix the call's structure; tensor sizes become symbols. A size of 1 does
        too where the model allows: the example is repeated along that axis, and the graph proved to be right for both sizes.
    dynamic_shapes: "auto" (every axis that the model allows), None (all fixed), or torch.export's own specification.
    stamp: trace three of a list of equal layers and stamp out the others, where that provably gives the same graph; what
        was done, or why all layers were traced, is logged by the logger "peft_fx".

    Returns a GraphModule that is called like the model and is in the model's mode. Raises CaptureError naming the module
    and the remedy for what cannot be captured, e.g. control flow that depends on data.
    """
    if isinstance(model, ExportedProgram):
        return from_program(model)
    if not isinstance(model, nn.Module):
        raise CaptureError(f"capture takes an nn.Module or an ExportedProgram, got {type(model).__name__}")
    if ROOT in model._modules:
        raise CaptureError("this is a captured graph already: the verbs take it as it is, capture takes the model")
    if any(getattr(m.__dict__.get("forward"), "active_adapters", ()) for m in model.modules()):
        raise CaptureError(
            "this model's modules run with adapters: the PeftModel's to_graph(args, kwargs) captures it with them, and "
            "unload() takes them away"
        )
    given = not isinstance(args, (tuple, list)) or args or kwargs
    if given:
        refuse_no_call(model, args, kwargs)
    elif is_hugging_face(model):
        kwargs = example_inputs(cast("PreTrainedModel", model))
    else:
        raise CaptureError(f"{type(model).__name__} needs example inputs: capture(model, args=(x,))")
    args, kwargs = separate(tuple(args), dict(kwargs or {}))
    with working(f"capturing {type(model).__name__}"), opened(model) as model:
        for axes, larger_args, larger in wider(args, kwargs) if given and dynamic_shapes is not None else ():
            try:
                gm = stamped(model, larger_args, larger, dynamic_shapes, stamp)
                refuse_difference(model, gm, args, kwargs)
                return gm
            except (CaptureError, GraphError) as reason:
                LOGGER.info("size 1 on axes %s of the example is kept: %s", axes, reason)
        return stamped(model, args, kwargs, dynamic_shapes, stamp)


def stamped(model: nn.Module, args: tuple, kwargs: dict, dynamic_shapes: Any, stamp: bool) -> fx.GraphModule:
    """The base graph; lists of equal layers are traced in part if `stamp` and that can be proved right."""
    shapes = auto_shapes(model, args, kwargs) if dynamic_shapes == "auto" else dynamic_shapes
    if lists := equal_lists(model) if stamp else {}:
        try:
            return traced(model, args, kwargs, shapes, lists)
        except (CaptureError, GraphError) as reason:
            LOGGER.info("all layers are traced: %s", reason)
    return traced(model, args, kwargs, shapes, {})


def traced(model: nn.Module, args: tuple, kwargs: dict, shapes: Any, lists: dict[str, nn.ModuleList]) -> fx.GraphModule:
    """The base graph of `model`; of `lists` only the first layers are traced, the others are stamped out."""
    table = module_table(model)
    mode, what = ByMode(model.training), described(model, lists)
    with shortened(model, lists):
        step(f"capturing {what} in eval mode")
        eval_program = export_in_mode(model, args, kwargs, shapes, training=False)
        program = eval_program if modes_agree(model, args, kwargs) else None
        try:
            if program is None:
                step(f"capturing {what} in train mode")
                program = export_in_mode(model, args, kwargs, shapes, training=True)
        except CaptureError as error:
            if model.training:
                text = f"{error}. In eval mode it can be captured: call model.eval() first"
                raise CaptureError(text) from error.__cause__
            program, mode.locked = eval_program, str(error)
    step(f"putting {what} together")
    gm = module_of(program, skeleton(model), mode, table)
    clean = [InlineGradRegions()]
    if program is eval_program:
        run(clean, gm)
    else:
        evaluation = module_of(eval_program, skeleton(model), ByMode(False), table)
        run(clean, evaluation)
        gm = in_current_mode(gm, evaluation, clean)
    gm = finish(gm, table, next(model.parameters(), torch.empty(0)).device, lists)
    if lists:
        step(f"proving that {what} is right")
        refuse_difference(model, gm, args, kwargs)
        LOGGER.info("stamped out: %s", ", ".join(f"{path} ({len(layers)} layers)" for path, layers in lists.items()))
    return gm


def described(model: nn.Module, lists: dict[str, nn.ModuleList]) -> str:
    """The model, and how many layers are traced of how many, for who waits."""
    layers = sum(map(len, lists.values()))
    return type(model).__name__ + (f", {TRACED * len(lists)} of {layers} layers traced" if layers else "")


def in_current_mode(gm: fx.GraphModule, evaluation: fx.GraphModule, clean: list) -> fx.GraphModule:
    """The training capture with literals that follow the mode; if the two cannot be aligned, the current mode's capture."""
    run([*clean, MarkModes(evaluation)], gm)
    if store_of(gm).mode.locked and not store_of(gm).mode.training:
        lock(evaluation, store_of(gm).mode.locked)
        return evaluation
    return gm


def finish(gm: fx.GraphModule, table: ModuleTable, device: torch.device, lists: dict | None = None) -> fx.GraphModule:
    """The rest of normalisation; records kinds of weights of unknown classes and the base graph."""
    reports = run([NameParameters(table), DropWeightChecks(), Linearise(), MarkDevice(device), CheckInputs()], gm)
    reports += stamp_layers(gm, lists or {})
    table = with_kinds(table, observed_kinds(gm.graph))
    state = gm.meta["peft_fx"]
    gm.meta["peft_fx"] = state.update(table=table, base=BaseGraph(copy_graph(gm.graph)), reports=reports)
    return gm


def with_kinds(table: ModuleTable, kinds: dict[str, list]) -> ModuleTable:
    """Adds to each record how its parameters were seen to be read: {parameter: [kind, transposed, groups]}."""

    def seen(record: ModuleRecord) -> ModuleRecord:
        own = {p: kinds[n] for p in record.parameters if (n := f"{record.path}.{p}" if record.path else p) in kinds}
        return replace(record, attributes={**record.attributes, "kinds": own}) if own else record

    return replace(table, records=tuple(map(seen, table.records)))


def skeleton(model: nn.Module) -> nn.Module:
    """The model's module tree as plain containers around the model's own parameters and buffers."""
    copies: dict[nn.Module, nn.Module] = {}

    def contain(module: nn.Module) -> nn.Module:
        if isinstance(module, Packed):
            return copies.setdefault(module, module.again())
        if module not in copies:
            new = copies[module] = nn.Module()
            new.training = module.training
            if hasattr(module, "_hf_hook"):  # accelerate's: says where offloaded weights are during a call
                new._hf_hook = module._hf_hook
            new._parameters.update(module._parameters)
            new._buffers.update(module._buffers)
            new._non_persistent_buffers_set |= module._non_persistent_buffers_set
            for name, child in module._modules.items():
                if child is not None and not isinstance(child, Adapters):
                    new._modules[name] = contain(child)
        return copies[module]

    return contain(model)


def module_of(program: ExportedProgram, tree: nn.Module, mode: ByMode, table: ModuleTable) -> fx.GraphModule:
    """A graph module over `tree` that runs the program's graph; adds regions and lifted constants, which only it has."""
    exported = program.module(check_guards=False)
    device = next(tree.parameters(), torch.empty(0)).device
    state = State(table, BaseGraph(fx.Graph()), dict(program.range_constraints))
    buffers = {n: (b, n not in tree._non_persistent_buffers_set) for n, b in tree._buffers.items()}
    modules = {ROOT: Store(mode, ByDevice(device)), **{n: m for n, m in tree._modules.items() if m is not None}}
    gm = build(modules, dict(tree._parameters), buffers, fx.Graph(), state)
    for node in exported.graph.nodes:
        if node.op != "get_attr":
            continue
        value = get_attribute(exported, node.target)
        if isinstance(value, fx.GraphModule):
            gm.add_module(node.target, value)
        elif get_tensor(gm, node.target) is None:
            set_tensor(gm, node.target, value, persistent=isinstance(value, nn.Parameter))
    set_graph(gm, copy_graph(exported.graph))  # a graph has one owner
    pack(gm)
    return gm


def pack(gm: fx.GraphModule) -> None:
    """What a file's program holds of packed weights is plain containers: gives them their formats again."""
    for node in gm.graph.find_nodes(op="call_function", target=DEQUANTIZE):
        name = packed_name(node)
        owner, leaf = owner_of(gm, name)
        container: Any = owner._modules[leaf + SUFFIX]
        if not isinstance(container, Packed):
            names = [n.target.rpartition(".")[2] for n in node.args[0]]
            owner._modules[leaf + SUFFIX] = Packed(read(node.args[1])[1], {n: container._buffers[n] for n in names})


def get_attribute(module: nn.Module, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def from_program(program: ExportedProgram) -> fx.GraphModule:
    """An ExportedProgram's graph; it has the one mode it was exported in."""
    tree = skeleton(program.module(check_guards=False))
    tree._modules.pop(ROOT, None)  # of a graph of ours that torch exported: its adapters come back as plain parameters
    retie(tree)
    table = program_table(program, tree)
    mode = ByMode(False, "it comes from an ExportedProgram; capture the model itself to have both")
    gm = module_of(program, tree, mode, table)
    run([InlineGradRegions()], gm)
    return finish(gm, table, next(tree.parameters(), torch.empty(0)).device)
