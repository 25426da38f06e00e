"""`torch.export` and ONNX: one program for every batch, and for every length of the captions."""

import pytest
import torch
from common import BACKENDS
from networks import IMAGE, cast, config, inputs, randomise
from torch.export import Dim, export

from lumina import NextDiT

BATCH, TEXT = Dim("batch", min=1, max=64), Dim("text", min=1, max=512)
SHAPES = ({0: BATCH}, {0: BATCH}, {0: BATCH, 1: TEXT}, {0: BATCH, 1: TEXT})


def network(backend, **changes):
    torch.manual_seed(0)
    model = NextDiT(config(dim=48, **changes), backend)
    return randomise(model.cpu(), torch.float32).float().eval()


def arguments(batch, text):
    torch.manual_seed(batch)
    x, t, feats, mask = (z.cpu() for z in cast(inputs(*IMAGE), torch.float32))
    x, t, mask = (z.repeat(3, *[1] * (z.ndim - 1))[:batch] for z in (x, t, mask))
    feats = torch.randn(batch, text, feats.shape[-1])
    return x, t, feats, torch.cat([mask, mask], 1)[:, :text].contiguous()


@pytest.mark.parametrize("backend", [None, "torch"])
def test_export_of_any_batch(backend):
    model = network(backend, n_layers=2 if backend is None else 1)
    program = export(model, arguments(2, 5), dynamic_shapes=SHAPES)
    targets = {str(node.target) for node in program.graph.nodes}
    if backend is None and "cpu" in BACKENDS:
        assert any(
            "gqa_attention" in target for target in targets
        )  # the op, not what it is made of
    for batch, text in ((2, 5), (1, 7), (7, 1)):
        given = arguments(batch, text)
        torch.testing.assert_close(program.module()(*given), model(*given), rtol=1e-4, atol=1e-5)


def test_export_of_captions_alone():
    """The part of the network that a run needs once."""
    model, named = network(None), dict(cap_feats={0: BATCH, 1: TEXT}, cap_mask={0: BATCH, 1: TEXT})
    _, _, feats, mask = arguments(2, 5)

    class Captions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = model

        def forward(self, cap_feats, cap_mask):
            caption = self.network(cap_feats=cap_feats, cap_mask=cap_mask)
            return caption.pooled, caption.keys, caption.values

    program = export(Captions(), (feats, mask), dynamic_shapes=named).module()
    _, _, feats, mask = arguments(3, 6)
    caption = model.encode_caption(feats, mask)
    pooled, keys, values = program(feats, mask)
    torch.testing.assert_close(pooled, caption.pooled)
    torch.testing.assert_close([*keys, *values], [*caption.keys, *caption.values])


def test_onnx(tmp_path):
    """With the backend "torch", whose ops ONNX has."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    model, file = network("torch", n_layers=1), tmp_path / "network.onnx"
    program = torch.onnx.export(
        model, arguments(2, 5), dynamo=True, dynamic_shapes=SHAPES, verbose=False
    )
    program.save(file)
    stored = onnx.load(file)
    onnx.checker.check_model(stored)
    names = [value.name for value in stored.graph.input]
    for batch, text in ((2, 5), (3, 7)):
        given = arguments(batch, text)
        feed = {name: z.numpy() for name, z in zip(names, given, strict=True)}
        (out,) = ReferenceEvaluator(stored).run(None, feed)
        expected = model(*given).detach()
        torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-4, atol=1e-5)
