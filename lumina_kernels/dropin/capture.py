"""From the graph that Dynamo hands to a backend to one of ATen ops that are still whole."""

from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx


def capture(gm: GraphModule) -> GraphModule:
    """The same computation in ATen ops as autograd sees them: linear, layer_norm, rms_norm and
    scaled_dot_product_attention are one node each. Every node has its fake result in meta["val"].
    """
    inputs = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
    # That of these values, not the fresh one which Dynamo has ready for backends.
    fake_mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
    with fake_mode:
        return make_fx(gm, pre_dispatch=True)(*inputs)
