"""Gated linear units and GELU."""

from torch.fx import Graph, Node

from lumina_kernels import gelu, swiglu
from lumina_kernels.dropin.graph import aten, bare, call, is_tensor, packet, products, val


def glu_of(node) -> tuple[Node, Node] | None:
    """a and b of silu(a) * b, shaped alike."""
    for activated, b in products(node):
        silu = bare(activated)
        if packet(silu) is not aten.silu or not is_tensor(b):
            continue
        a = bare(silu.args[0])
        if is_tensor(a) and str(val(a).shape) == str(val(b).shape) and val(a).ndim > 0:
            if val(a).dtype == val(b).dtype == val(node).dtype:
                return a, b
    return None


def emit(graph: Graph, node: Node, pair: tuple[Node, Node]) -> Node:
    return call(graph, swiglu, *pair)


def emit_gelu(graph: Graph, node: Node) -> Node:
    return call(graph, gelu, node.args[0], node.kwargs.get("approximate", "none"))
