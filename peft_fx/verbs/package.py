"""`package` and `load_package`: a graph compiled ahead of time by AOTInductor, with adapters that can still be swapped.

A package is torch's `.pt2` archive with two more files: the JSON of `export`, and the adapters' tensors. Loading puts those
tensors in the place of the compiled constants (user-managed: the code reads our memory), so that `hotswap` and `switch`
write them with `copy_`, as in any graph. What the compiler would fold or write into the code as a number stays a tensor.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import safetensors.torch
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from ..atomic import StrPath
from ..engine.adding import base_weight, values_of
from ..engine.placed import adopt
from ..errors import AdapterFileError, GraphError, HotswapError
from ..files.archive import archive_to, opened, replace_archive
from ..files.paths import as_path
from ..files.registrations import register_named
from ..passes.core.nodes import calling, results_of
from ..planning.plan import Placement
from ..recipe import Recipe
from ..storage.packed import SUFFIX, Packed
from ..storage.schemes import read
from ..store.lazy import copy_graph
from ..store.modules import ByDevice, ByMode, Store, build, derive
from ..store.state import BaseGraph, State, state_of
from ..store.tensors import ADAPTERS, GATES, ROOT, set_packed, set_tensor, store_of, tensor_of
from ..target import ModuleTable, sizes
from .export import EXTRA, FORMAT, export, residents, to_json

STATE, TENSORS = f"extra/{EXTRA}", f"data/{ROOT}/adapters.safetensors"
COMPILED = f"{ROOT}.compiled"
LITERALS = (type(None), bool, int, float, str)

# What makes the compiler treat a constant's numbers as known.
KEEP_CONSTANTS = {
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,
    "freezing": False,
    "aot_inductor.use_runtime_constant_folding": False,
}
FOLD_CONSTANTS = {"freezing": True}


def package(tuned: fx.GraphModule, path: StrPath, *, swappable: bool = True) -> Path:
    """Compiles the graph and writes it as a `.pt2`, atomically; `peft_fx.load_package` runs it without the model's code.

    swappable: whether `hotswap` and `switch` work on the package. If not, adapters are frozen, and the compiler folds what it
    can. A merged graph gives a package of the plain model.

    Raises GraphError for a graph in train mode, or one whose inputs or outputs compiled code cannot have.
    """
    path, state = as_path(path, "a .pt2 file to write"), state_of(tuned, "package")
    if tuned.training:
        raise GraphError("a package runs inference: call eval() on the graph first")
    if path.suffix != ".pt2":
        raise AdapterFileError(f"{path}: expected a file name that ends in .pt2")
    plain, outputs = with_tensor_outputs(tuned, state)
    program = export(plain, decompose=True)
    named = {**program.state_dict, **program.constants}
    tensors = swappable_tensors(tuned, state) if swappable else {}
    info = calling(tuned.graph)
    data = to_json(state, training=False) | {
        "swappable": swappable,
        "device": str(next((t.device for t in named.values()), "cpu")),
        "arguments": info.orig_args,
        "in_spec": spec_text(info.in_spec),
        "out_spec": spec_text(cast(pytree.TreeSpec, info.out_spec)),
        "inputs": [described(n, state) for n in tuned.graph.find_nodes(op="placeholder")],
        "outputs": outputs,
        "constants": {name: form(t) for name, t in tensors.items()},
        "base": {name: form(t) for name, t in named.items() if not name.startswith(f"{ROOT}.")},
        "packed": {name: [m.text, [*m.tensors]] for name, m in packed_weights(tuned)},
        "operators": sorted({f"torch.ops.{n.target}" for n in program.graph.nodes if n.op == "call_function"}),
    }

    def write(compiled: Path) -> None:
        options = KEEP_CONSTANTS if swappable or data["packed"] else FOLD_CONSTANTS  # packed weights stay packed
        archive_to(compiled, lambda file: compile_to(file, program, options))
        if tensors:
            refuse_folded(program, tensors, torch._inductor.aoti_load_package(str(compiled)).get_constant_fqns())
        with zipfile.ZipFile(compiled, "a") as archive:
            root = archive.namelist()[0].partition("/")[0]
            archive.writestr(f"{root}/{STATE}", json.dumps(data))
            archive.writestr(f"{root}/{TENSORS}", safetensors.torch.save(tensors))

    replace_archive(path, write)
    return path


def with_tensor_outputs(tuned: fx.GraphModule, state: State) -> tuple[fx.GraphModule, list]:
    """The graph returning a flat tuple of its tensors, and per output of the original null or the constant, in a list."""
    new = derive(tuned, copy_graph(tuned.graph), state)
    node, info = new.graph.output_node(), calling(new.graph)
    flat = list(results_of(new.graph))
    for value in flat:
        if not isinstance(value.meta.get("val") if isinstance(value, fx.Node) else value, (torch.Tensor, *LITERALS)):
            raise GraphError(f"output {value} is neither a tensor nor a constant: compiled code cannot return it")
    tensors = tuple(v for v in flat if is_tensor(v))
    node.args = (tensors,)
    spec = pytree.tree_structure(tensors)
    new.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(info.orig_args, info.in_spec, spec)))
    new.recompile()
    return new, [None if is_tensor(v) else [v.meta["val"] if isinstance(v, fx.Node) else v] for v in flat]


def is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def described(node: fx.Node, state: State) -> dict:
    """What compiled code takes as this input: a constant, or a tensor's dtype and sizes, symbols where they vary.

    Below 2 torch.export only says that it did not look for other code at sizes 0 and 1: 1 is taken.
    """
    value = node.meta.get("val")
    if isinstance(value, LITERALS):
        return {"name": node.name, "constant": value}
    if not isinstance(value, torch.Tensor):
        raise GraphError(f"input {node.name}: compiled code takes tensors and constants, not {type(value).__name__}")
    sizes = [varying(size) if isinstance(size, torch.SymInt) else size for size in value.shape]
    ranges = {str(symbol): values for symbol, values in state.range_constraints.items() if str(symbol) in sizes}
    limits = {
        symbol: [1 if values.lower <= 2 else int(values.lower), int(values.upper) if values.upper.is_Integer else None]
        for symbol, values in ranges.items()
    }
    return {"name": node.name, "dtype": dtype_name(value), "sizes": sizes, "limits": limits}


def packed_weights(gm: fx.GraphModule) -> Iterator[tuple[str, Packed]]:
    """(name, what keeps it) of the model's packed weights."""
    for name, module in gm.named_modules(remove_duplicate=False):
        if isinstance(module, Packed) and not name.startswith(f"{ROOT}."):
            yield name.removesuffix(SUFFIX), module


def varying(size: torch.SymInt) -> int | str | None:
    """The number that a size was fixed to, its symbol, or None for what follows from other sizes."""
    number = size.node.maybe_as_int()
    return number if number is not None else str(size) if size.node.expr.is_Symbol else None


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def spec_text(spec: pytree.TreeSpec) -> str:
    try:
        return pytree.treespec_dumps(spec)
    except NotImplementedError as error:
        raise GraphError(f"the inputs or outputs cannot be described in a file: {error}") from error


def form(tensor: torch.Tensor) -> list:
    return [list(tensor.shape), dtype_name(tensor)]


def swappable_tensors(tuned: fx.GraphModule, state: State) -> dict[str, torch.Tensor]:
    """Copies by full name: the tensors of active adapters, gates, and the base weights that a swap computes tensors from."""
    roots = (*(f"{ADAPTERS}.{name}." for name in state.acting), f"{GATES}.")
    sources = {name for p in state.placed(state.acting) for name in needed(tuned, p)}
    named = [*tuned.named_parameters(remove_duplicate=False), *tuned.named_buffers(remove_duplicate=False)]
    kept = {name: t for name, t in named if name.startswith(roots) or name in sources}
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in kept.items()}


def needed(tuned: fx.GraphModule, p: Placement) -> set[str]:
    """Base weights whose numbers, not only their shapes, give tensors of the placement that files do not hold."""
    found = set()
    for name, spec in p.tensors.items():
        if spec.key is None and name not in p.shared:
            targets = spec.sources or (p.target,)
            weights = [base_weight(tuned, t).to("meta") for t in targets]
            made = torch.empty(spec.shape, dtype=tensor_of(tuned, f"{ADAPTERS}.{p.state_name(name)}").dtype)
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=()):
                    values = values_of(tuned, p, spec.needs, {})
                    spec.init(made, weights if spec.sources else weights[0], *values)
            except (NotImplementedError, RuntimeError, TypeError, ValueError):  # there are no numbers on meta
                found |= {t.tensor_name for t in targets}
    return found


def compile_to(file: IO[bytes], program: ExportedProgram, options: dict) -> None:
    """Compiles the program. Inputs are taken as contiguous, and adapter tensors as contiguous and unlike any other's memory."""
    for held in (program._state_dict, cast(dict[str, Any], program._constants)):
        for name, tensor in held.items():
            if name.startswith(f"{ROOT}."):
                own = tensor.detach().clone(memory_format=torch.contiguous_format)
                held[name] = nn.Parameter(own, requires_grad=False) if isinstance(tensor, nn.Parameter) else own
    users = {s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"}
    flat = []
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in users:
            if isinstance(value := node.meta.get("val"), FakeTensor):
                with value.fake_mode:
                    node.meta["val"] = value.contiguous()
            flat.append(node.meta.get("val"))
    program._example_inputs = pytree.tree_unflatten(flat, program.call_spec.in_spec)
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=dict(options))


def refuse_folded(program: ExportedProgram, tensors: dict, compiled: list[str]) -> None:
    """Raises GraphError if an adapter tensor that the graph reads, beyond counting it up, is no constant of the code."""
    nodes = {n.name: n for n in program.graph.find_nodes(op="placeholder")}
    gone = [
        s.target
        for s in program.graph_signature.input_specs
        if s.target in tensors
        and s.target not in compiled
        and any(u.users or u.args[0] is not nodes[s.arg.name] for u in nodes[s.arg.name].users)
    ]
    if gone:
        raise GraphError(
            f"{gone[0]}: the compiler made it part of the code, so that it could not be swapped ({len(gone)} such "
            "tensors); package with swappable=False"
        )


class Compiled(nn.Module):
    """Runs the compiled code on flat inputs, after checking them: it would read wrong memory for others."""

    def __init__(self, runner: Any, data: dict) -> None:
        super().__init__()
        self.run, self.inputs, self.outputs = runner.loader.boxed_run, data["inputs"], data["outputs"]
        self.device = torch.device(data["device"])

    @torch.no_grad()
    def forward(self, *values: torch.Tensor) -> Any:
        given: list[torch.Tensor] = []
        bound: dict[str, int] = {}
        for value, expected in zip(values, self.inputs, strict=True):
            if "constant" in expected:
                fits = value is expected["constant"] or value == expected["constant"]
            elif fits := isinstance(value, torch.Tensor):
                fits = self.fits(value, expected, bound)
                given.append(value.contiguous())
            if not fits:
                raise GraphError(f"compiled for {told(expected)}, called with {seen(value)}")
        results = iter(self.run(given))
        return [next(results) if constant is None else constant[0] for constant in self.outputs]

    def fits(self, value: torch.Tensor, expected: dict, bound: dict[str, int]) -> bool:
        """Device type, dtype and sizes; a symbol has one size in a call. bound: sizes of the symbols so far."""
        sizes, limits = expected["sizes"], expected["limits"]
        if (value.device.type, dtype_name(value), value.dim()) != (self.device.type, expected["dtype"], len(sizes)):
            return False
        for size, wanted in zip(value.shape, sizes, strict=True):
            if isinstance(wanted, str):
                low, high = limits.get(wanted, (size, None))
                if size < low or size > (high or size) or size != bound.setdefault(wanted, size):
                    return False
            elif size != (size if wanted is None else wanted):
                return False
        return True


def told(expected: dict) -> str:
    """An input that compiled code takes, for messages."""
    if "constant" in expected:
        return f"{expected['name']} = {expected['constant']!r}"
    shape = sizes("any" if size is None else size for size in expected["sizes"])
    ranges = "".join(f", {s} from {low} to {high or 'any'}" for s, (low, high) in expected["limits"].items())
    return f"{expected['name']} = {expected['dtype']} {shape}{ranges}"


def seen(value: Any) -> str:
    return (
        f"{dtype_name(value)} {sizes(value.shape)} on {value.device}"
        if isinstance(value, torch.Tensor)
        else repr(value)
    )


@dataclass(frozen=True)
class Package:
    """Compiled code that is called like the captured graph; it computes no gradients. `hotswap` and `switch` take it.

    recipe: the adapters in it, with their configs. active, merged: their names. swappable: as packaged.
    """

    path: Path
    swappable: bool
    held: fx.GraphModule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.held(*args, **kwargs)

    @property
    def recipe(self) -> Recipe:
        state = state_of(self.held)
        return Recipe({name: state.recipe[place].config for name, place in state.residents.items()})

    @property
    def active(self) -> tuple[str, ...]:
        state = state_of(self.held)
        return state.called(state.acting)

    @property
    def merged(self) -> tuple[str, ...]:
        state = state_of(self.held)
        return state.called(state.merged)

    @property
    def _orig_mod(self) -> fx.GraphModule:
        """As for torch.compile's results: the graph module whose tensors the compiled code reads."""
        if not self.swappable:
            raise HotswapError(f"{self.path}: packaged with swappable=False, its adapters are part of the code")
        return self.held

    def __reduce__(self) -> Any:
        raise GraphError(
            f"a package cannot be copied or pickled; load it again: peft_fx.load_package({str(self.path)!r})"
        )

    def __repr__(self) -> str:
        adapters = ", ".join(f"{name}: {config.peft_type}" for name, config in self.recipe.items())
        return f"Package({str(self.path)!r}, adapters=[{adapters}], swappable={self.swappable})"


def load_package(path: StrPath) -> Package:
    """Loads a `.pt2` written by `package`: called with the same inputs, it gives the same outputs as the graph.

    Raises AdapterFileError for files of another origin. A package is native code: load files of people you trust only.
    """
    path = as_path(path, "a .pt2 file")
    with opened(path) as archive:
        entries = {name.partition("/")[2]: name for name in archive.namelist()}
        if not any(name.startswith("data/aotinductor/") for name in entries):
            raise AdapterFileError(f"{path}: holds no compiled code; peft_fx.load reads exported programs")
        if STATE not in entries or TENSORS not in entries:
            raise AdapterFileError(
                f"{path}: holds compiled code, but peft_fx.package did not write it; torch._inductor.aoti_load_package "
                "runs it"
            )
        try:
            text = archive.read(entries[STATE])
            register_named(text, path)
            return loaded(path, json.loads(text), safetensors.torch.load(archive.read(entries[TENSORS])))
        except AdapterFileError:
            raise
        except Exception as error:
            raise AdapterFileError(f"{path}: is damaged: {type(error).__name__}: {error}") from error


def loaded(path: Path, data: dict, tensors: dict[str, torch.Tensor]) -> Package:
    """The package: a graph module whose only operation is the compiled code."""
    if data["format"] != FORMAT:
        raise AdapterFileError(f"{path}: written in format {data['format']!r}, this version reads {FORMAT}")
    device = torch.device(data["device"])
    state = State(ModuleTable.from_json(data["table"]), BaseGraph(fx.Graph()))
    state = state.update(
        recipe=residents(data, state, str(path)),
        active=(*data["merged"], *data["active"]),
        merged=tuple(data["merged"]),
        merge_report=tuple(data["merge_report"]),
        gated=bool(data["slots"]),
    )
    info = _PyTreeInfo(
        data["arguments"], pytree.treespec_loads(data["in_spec"]), pytree.treespec_loads(data["out_spec"])
    )
    graph = fx.Graph()
    graph.output(graph.call_module(COMPILED, tuple(graph.placeholder(i["name"]) for i in data["inputs"])))
    graph.set_codegen(_PyTreeCodeGen(info))
    held = build({ROOT: Store(ByMode(False, "it is compiled"), ByDevice(device))}, {}, {}, graph, state)
    runner = torch._inductor.aoti_load_package(str(path))
    store_of(held).add_module("compiled", Compiled(runner, data))
    for name, (shape, dtype) in data["base"].items():
        set_tensor(held, name, torch.empty(shape, dtype=getattr(torch, dtype), device="meta"))
    for name, (text, own) in data["packed"].items():
        tensors_of = {n: tensor_of(held, f"{name}{SUFFIX}.{n}") for n in own}
        set_packed(held, name, Packed(read(text)[1], tensors_of))
    for name, expected in data["constants"].items():
        if form(tensors[name]) != expected:
            raise AdapterFileError(f"{path}: {name} is {form(tensors[name])}, expected {expected}")
        set_tensor(held, name, tensors[name].to(device))
    adopt(held, state.placed(state.recipe))
    swapped = [name for name in runner.get_constant_fqns() if name in tensors and name.startswith(f"{ROOT}.")]
    ours = {name: tensor_of(held, name) for name in swapped}
    runner.load_constants(ours, check_full_update=False, user_managed=True)
    held.recompile()
    return Package(path, data["swappable"], held)
