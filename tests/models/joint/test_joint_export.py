"""`torch.export` of the joint networks: one program for every batch and length of the captions."""

from dataclasses import replace

import pytest
import torch
from joint_networks import CONFIGS, NETWORKS, inputs
from networks import cast, randomise
from torch.export import Dim, export

BATCH, TEXT = Dim("batch", min=1, max=64), Dim("text", min=2, max=512)
SHAPES = ({0: BATCH}, {0: BATCH}, {0: BATCH, 1: TEXT}, {0: BATCH, 1: TEXT})


@pytest.mark.parametrize("name", ["lumina2", "z_image"])
def test_export_of_any_batch(name):
    config = replace(CONFIGS[name], n_layers=1, n_refiner_layers=1)
    model = randomise(NETWORKS[type(config)](config)).float().eval().requires_grad_(False).cpu()
    x, t, feats, mask = (z.cpu() for z in cast(inputs((4, 6)), torch.float32))
    with torch.no_grad():
        program = export(model, (x, t, feats, mask), dynamic_shapes=SHAPES, strict=False).module()
        for batch, text in ((2, 30), (1, 35), (3, 7)):
            given = x[:batch], t[:batch], feats[:batch, :text], mask[:batch, :text]
            torch.testing.assert_close(program(*given), model(*given), rtol=1e-4, atol=1e-5)
