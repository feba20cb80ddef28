"""What an ExportedProgram still knows about the module tree it came from, and its ties."""

from __future__ import annotations

from torch import nn
from torch.export import ExportedProgram

from ...planning.modules import identity, tied_parameters
from ...target import ModuleRecord, ModuleTable


def retie(tree: nn.Module) -> None:
    """Makes parameters that share one memory one object again: loading a program splits them."""
    first: dict[tuple, nn.Parameter] = {}
    for module in tree.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = first.setdefault(identity(parameter), parameter)


def program_table(program: ExportedProgram, tree: nn.Module) -> ModuleTable:
    """The module table as far as the graph tells: paths and class names of modules that ran, and all parameters.

    Base classes and attributes are not recorded in a program; operator kinds are then read off the graph.
    """
    types: dict[str, str] = {}
    for node in program.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
            types.setdefault(path.split("@")[0], name.rpartition(".")[2])
    paths = {module: [path] for path, module in tree.named_modules()}
    records = tuple(
        ModuleRecord(
            path=path,
            type=types.get(path, "Module"),
            bases=(types.get(path, "Module"),),
            parameters={n: tuple(p.shape) for n, p in module._parameters.items() if p is not None},
            buffers={
                n: tuple(b.shape)
                for n, b in module._buffers.items()
                if b is not None and n not in module._non_persistent_buffers_set
            },
        )
        for module, (path,) in paths.items()
    )
    return ModuleTable(records=records, model_class=types.get(""), tied=tied_parameters(paths))
