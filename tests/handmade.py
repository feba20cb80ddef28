"""Graph modules that are written node by node, with what a capture leaves on them: for the direct tests of passes."""

import torch
from peft_fx.passes.core.fakes import fake_of
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from peft_fx.planning.modules import module_table
from peft_fx.store.lazy import copy_graph
from peft_fx.store.modules import ByDevice, ByMode, Store, build
from peft_fx.store.state import BaseGraph, State
from peft_fx.store.tensors import ROOT, get_tensor
from peft_fx.verbs.capture.model import skeleton

aten = torch.ops.aten


class Hand:
    """A graph over the tensors of `model`, in the order in which its nodes are asked for."""

    def __init__(self, model: nn.Module | None = None, training: bool = False):
        self.model = nn.Module() if model is None else model
        self.mode, self.graph, self.names = FakeTensorMode(shape_env=ShapeEnv()), fx.Graph(), []

        tree = skeleton(self.model)
        store = Store(ByMode(training), ByDevice(torch.device("cpu")))
        state = State(module_table(self.model), BaseGraph(fx.Graph()))
        buffers = {name: (tensor, True) for name, tensor in tree._buffers.items()}
        self.gm = build({ROOT: store, **tree._modules}, dict(tree._parameters), buffers, fx.Graph(), state)

    def input(self, name: str, value, dynamic: tuple[int, ...] = ()) -> fx.Node:
        """A placeholder; the sizes on the axes `dynamic` are symbols."""
        node = self.graph.placeholder(name)
        self.names.append(name)
        if isinstance(value, torch.Tensor):
            sizes = [DimDynamic.DYNAMIC if axis in dynamic else DimDynamic.STATIC for axis in range(value.dim())]
            value = self.mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
        node.meta["val"] = value
        return node

    def tensor(self, name: str) -> fx.Node:
        """A read of one of the model's tensors."""
        node = self.graph.get_attr(name)
        node.meta["val"] = fake_of(self.mode, get_tensor(self.model, name))
        return node

    def region(self, name: str, body: fx.GraphModule) -> fx.Node:
        self.gm.add_module(name, body)
        return self.graph.get_attr(name)

    def call(self, target, *args, at: str = "", **kwargs) -> fx.Node:
        """A call of `target`. at: path of the module in which it is."""
        node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"] if "val" in n.meta else getattr(self.gm, n.target))
        with self.mode:
            node.meta["val"] = target(*values[0], **values[1])
        paths = [at[:i] for i in range(1, len(at) + 1) if at[i : i + 1] in (".", "")]
        node.meta["nn_module_stack"] = {path: (path, "Module") for path in ("", *paths)}
        return node

    def output(self, *nodes: fx.Node) -> fx.GraphModule:
        """The module, called with the inputs in order; it gives a tuple."""
        self.graph.output(nodes)
        specs = [pytree.tree_structure(tuple(values)) for values in (self.names, nodes)]
        inputs = pytree.TreeSpec(tuple, None, [specs[0], pytree.tree_structure({})])
        self.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(list(self.names), inputs, specs[1])))
        self.gm.graph = self.graph
        state = self.gm.meta[ROOT]
        self.gm.meta[ROOT] = state.update(base=BaseGraph(copy_graph(self.gm.graph)))
        return self.gm


def body(function, *examples) -> fx.GraphModule:
    """A region: a graph of its own that gives a tuple, with values on its nodes."""
    gm = fx.symbolic_trace(function)
    with FakeTensorMode() as mode:
        FakeTensorProp(gm, mode).propagate(*examples)
    return gm


def targets(gm: fx.GraphModule) -> list:
    """What the graph calls, in order."""
    return [n.target for n in gm.graph.nodes if n.op in ("call_function", "call_module")]
