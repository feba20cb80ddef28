"""`export` and `load`: graphs to and from `.pt2` files.

A `.pt2` holds the adapted (or merged) program, tagged node by node, and in its extra files the JSON that no program has room
for: module table, adapter configs, what is active and merged.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from ..atomic import StrPath
from ..engine.placed import adopt
from ..engine.transitions import names_of, resident_of
from ..errors import AdapterFileError, GraphError
from ..files.archive import archive_to, opened, replace_archive
from ..files.paths import as_path
from ..files.registrations import register_for
from ..passes.capture.inline import InlineGradRegions
from ..passes.capture.literals import BakeLiterals
from ..passes.core.base import run
from ..passes.export.lift import lift
from ..passes.export.unpack import Unpack
from ..passes.inject.mixed import drop_input
from ..passes.inject.strip import StripSplices
from ..recipe import config_from_dict
from ..store.lazy import copy_graph
from ..store.modules import ByMode, derive
from ..store.state import BaseGraph, Resident, State, state_of
from ..target import ModuleTable
from .capture.model import finish, module_of, skeleton
from .capture.program import retie

EXTRA = "peft_fx.json"
FORMAT = 2


def export(graph: fx.GraphModule, path: StrPath | None = None, *, decompose: bool = False) -> ExportedProgram:
    """The graph as a `torch.export.ExportedProgram`, in the mode that it is in now; no re-tracing, tensors are shared.

    path: where to write a `.pt2` too (atomically); `peft_fx.load` reads it back with its adapters. A merged graph gives a
    program of plain operators under the model's own names. decompose: packed weights are dequantized by plain ATen operators,
    for runtimes that do not know ours; such a program is loaded by `torch.export.load`, without adapters. Where a scheme
    quantizes inputs too, the program's products are those with the dense weights, and a warning counts them.
    """
    state = state_of(graph, "export")
    baked = derive(graph, copy_graph(graph.graph), state)
    baked.train(graph.training)
    run([BakeLiterals(), Unpack()] if decompose else [BakeLiterals()], baked)
    program = lift(baked, state.range_constraints)
    device = next(graph.parameters(), torch.empty(0)).device
    if traced_device(program) not in (None, device):
        program = move_to_device_pass(program, device)
    if path is not None:
        extra = {} if decompose else {EXTRA: json.dumps(to_json(state, graph.training))}
        save(program, as_path(path, "a .pt2 file to write"), extra)
    return program


def traced_device(program: ExportedProgram) -> torch.device | None:
    """The device that the program's metadata means, if it has one parameter."""
    return next((n.meta["val"].device for n in program.graph.nodes if n.op == "placeholder"
                 and isinstance(n.meta.get("val"), torch.Tensor)), None)  # fmt: skip


def save(program: ExportedProgram, path: Path, extra: dict[str, str]) -> None:
    write = partial(torch.export.save, program, extra_files=extra)
    replace_archive(path, lambda complete: archive_to(complete, write))


def to_json(state: State, training: bool) -> dict:
    """The state as JSON; of the adapters only those that are part of the program."""
    kept = (*state.merged, *state.acting)
    return {
        "format": FORMAT,
        "training": training,
        "table": state.table.to_json(),
        "recipe": {name: resident.config.to_dict() for name, resident in state.recipe.items() if name in kept},
        "lowering": {name: resident.lowering for name, resident in state.recipe.items() if name in kept},
        "active": list(state.acting),
        "slots": {slot: resident.name for slot, resident in state.recipe.items()} if state.gated else {},
        "room": {slot: r.room.to_dict() for slot, r in state.recipe.items() if r.room is not None},
        "mixed": state.mixed,
        "aware": state.aware,
        "merged": list(state.merged),
        "merge_report": list(state.merge_report),
    }


def residents(data: dict, state: State, where: str) -> dict[str, Resident]:
    """The adapters, or slots, in the JSON of a state. where: the file, for messages."""
    forms, names, room = (data.get(key, {}) for key in ("lowering", "slots", "room"))
    return {
        place: resident_of(
            state,
            place,
            config_from_dict(config, where),
            forms.get(place, "auto"),
            name=names.get(place),
            room=config_from_dict(room.get(place, config), where) if names else None,
        )
        for place, config in data["recipe"].items()
    }


def load(path: StrPath) -> fx.GraphModule:
    """Reads a `.pt2` written by `export`: a graph that can be run, inspected, hot-swapped, merged and exported again.

    Its mode is the one it was exported in. A `.pt2` of another origin is read too, without adapters. Raises
    AdapterFileError for files that are no program, and for those that would run code when they are loaded. What a program
    computes is its author's: run files of people you trust only.
    """
    path = as_path(path, "a .pt2 file")
    program, extra = read_program(path)
    if not extra:
        from .capture.model import capture

        return capture(program)
    try:
        return restored(program, json.loads(extra), str(path))
    except (ValueError, KeyError, TypeError, AttributeError, GraphError) as error:  # AdapterFileError is a ValueError
        if isinstance(error, AdapterFileError):
            raise
        raise AdapterFileError(f"{path}: {EXTRA} in it is damaged: {type(error).__name__}: {error}") from error


def read_program(path: Path) -> tuple[ExportedProgram, str]:
    """The program in a `.pt2` and our JSON, "" if it has none. Compiled code in the file is refused, not loaded."""
    with opened(path) as archive:
        if any("/data/aotinductor/" in name for name in archive.namelist()):
            raise AdapterFileError(f"{path}: holds compiled code (AOTInductor); peft_fx.load_package runs it")
        register_for(archive)
    extra = {EXTRA: ""}
    try:
        return torch.export.load(str(path), extra_files=extra), extra[EXTRA]
    except Exception as error:
        raise AdapterFileError(f"{path}: is no torch.export program: {type(error).__name__}: {error}") from error


def restored(program: ExportedProgram, data: dict, where: str) -> fx.GraphModule:
    """The graph module that a program and its JSON stand for."""
    if data.get("format") != FORMAT:
        raise AdapterFileError(f"{where}: written in format {data.get('format')!r}, this version reads {FORMAT}")
    table = ModuleTable.from_json(data["table"])
    recipe = residents(data, State(table, None), where)
    names_of(State(table, None, recipe=recipe), [*data["active"], *data["merged"]])
    tree = skeleton(program.module(check_guards=False))
    retie(tree)
    store = tree._modules.pop("peft_fx", None)
    mode = ByMode(data["training"], f"{where} holds one mode; capture the model to have both")
    gm = module_of(program, tree, mode, table)
    if store is not None:
        for kept in ("adapters", "gates"):
            setattr(gm.peft_fx, kept, store._modules.get(kept, nn.Module()))
    run([InlineGradRegions()], gm)
    device = next(tree.parameters(), torch.empty(0)).device
    gm = finish(gm, table, device)
    adapted = copy_graph(gm.graph)
    run([StripSplices()], gm)
    if data.get("mixed"):
        drop_input(gm.graph)
    state = gm.meta["peft_fx"].update(
        table=table,
        base=BaseGraph(copy_graph(gm.graph)),
        recipe=recipe,
        active=(*data["merged"], *data["active"]),
        merged=tuple(data["merged"]),
        merge_report=tuple(data["merge_report"]),
        gated=bool(data.get("slots")),
        mixed=data.get("mixed", False),
        aware=data.get("aware", False),
    )
    gm.meta["peft_fx"] = state
    adopt(gm, state.placed(recipe))
    gm.graph = adapted
    if recipe:
        freeze_base(gm)
    return gm


def freeze_base(gm: fx.GraphModule) -> None:
    """Base parameters of a loaded adapted graph do not train, adapters keep what they had."""
    for name, parameter in gm.named_parameters():
        if not name.startswith("peft_fx."):
            parameter.requires_grad_(False)
