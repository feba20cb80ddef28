"""layer_replication: a deeper model out of the layers of a shallower one, base weights shared (as in Solar, mergekit).

    layers' = concat(layers[a:b] for (a, b) in ranges)

The layers' regions of the graph (contiguous runs of one layer's module path) are copied in the new order and renamed, so that
every copy is a layer of its own, with its own adapter tensors, over tied base weights.
"""

from __future__ import annotations

from torch import fx


def replicated(gm: fx.GraphModule, ranges) -> fx.GraphModule:
    raise NotImplementedError
