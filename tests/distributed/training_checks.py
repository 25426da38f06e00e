"""Training on a mesh, compared with training of the same network on the same pictures alone."""

import copy

import torch
from network_checks import EIGHT_ON_TWO, network
from networks import MASK, config
from processes import error, mean, refuses
from torch.distributed.device_mesh import init_device_mesh

from lumina import Lumina2, Lumina2Config, NextDiT
from lumina.distributed.parallelize import parallelize
from lumina.distributed.sequence import SequenceParallel


def pictures():
    """Four of 15 tokens, in no way alike."""
    x, t, feats = torch.randn(4, 3, 6, 10), torch.rand(4), torch.randn(4, 5, 24)
    return x, t, feats, MASK.cpu()[[0, 1, 1, 0]]


def losses_of(model, arguments, steps):
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.02), []
    for _ in range(steps):
        loss = (model(*arguments) - arguments[0]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def trained_in_parts(mesh, family="next_dit", steps=20, n_layers=2, **options):
    """mesh: dimension -> size."""
    if family == "next_dit":
        alone = network({**EIGHT_ON_TWO, "n_layers": n_layers})
    else:
        sizes = dict(dim=48, n_heads=2, n_kv_heads=1, axes_dims=(8, 8, 8), axes_lens=(64, 64, 64))
        alone = Lumina2(Lumina2Config(n_layers=n_layers, in_channels=3, cap_feat_dim=24, **sizes))
        for p in alone.parameters():
            torch.nn.init.normal_(p, std=0.05)
    before, arguments = copy.deepcopy(alone), pictures()
    mesh = init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh))
    model = parallelize(copy.deepcopy(alone), mesh, **options)
    part = arguments
    for name in ("replicate", "data"):
        if name in mesh.mesh_dim_names:
            ranks = mesh[name]
            part = [x.chunk(ranks.size())[ranks.get_local_rank()] for x in part]
    losses = mean({"losses": losses_of(model, part, steps)})["losses"]
    expected, start = losses_of(alone, arguments, steps), before.state_dict()
    errors, moved = {"losses": error(losses, expected)}, 0.0
    found = {name: whole(p) for name, p in model.state_dict().items()}  # of the same names
    for name, p in alone.state_dict().items():
        errors[name] = error(found[name], p, floor=0.1)
        moved = max(moved, error(p, start[name], floor=0.1))
    assert moved > 0.05 and expected[-1] < expected[0]
    return errors


def computes_in_16_bits(_):
    """As the network in bfloat16, with gradients in float32."""
    alone, arguments = network(EIGHT_ON_TWO), pictures()
    arguments = [z.bfloat16() if i in (0, 2) else z for i, z in enumerate(arguments)]
    expected = copy.deepcopy(alone).bfloat16()(*arguments)
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("data",))
    model = parallelize(alone, mesh, param_dtype=torch.bfloat16)
    found = model(*arguments)
    found.float().square().mean().backward()
    for p in model.parameters():
        assert p.dtype == p.grad.dtype == torch.float32
    return {"out": error(found, expected)}


def keeps_a_share_of_the_state(mesh):
    """Parameters and the optimiser's moments: 1 / ranks of them, and at most 10 % besides; with
    replicas, ranks of each."""
    alone, arguments = network({**EIGHT_ON_TWO, "n_layers": 2}), pictures()
    whole, ranks = 3 * sum(p.numel() for p in alone.parameters()), mesh[-1]
    names = ("replicate", "data")[-len(mesh) :]
    mesh = init_device_mesh("cpu", mesh, mesh_dim_names=names)
    model = parallelize(alone, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(*arguments).square().mean().backward()
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    kept = sum(x.to_local().untyped_storage().nbytes() for x in (*model.parameters(), *moments)) / 4
    assert len(moments) == 2 * len(list(model.parameters())) and kept >= whole / ranks
    return {"kept": max(0.0, kept / whole - 1.1 / ranks)}


def refused_by_parallelize(_):
    shared = init_device_mesh("cpu", (4,), mesh_dim_names=("ulysses",))
    other = init_device_mesh("cpu", (4,), mesh_dim_names=("tensor",))
    late = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "replicate"))
    with torch.device("meta"):
        alone = NextDiT(config())
        alone.sequence_parallel = SequenceParallel.from_mesh(shared)
        parallelize(
            alone, init_device_mesh("cpu", (4, 1), mesh_dim_names=("data", "ring")), fsdp=False
        )
        model, two = NextDiT(config()), NextDiT(config(dim=48, n_heads=2, n_kv_heads=1))
    return {
        "one rank": float(alone.sequence_parallel is not None),
        "mesh": refuses(ValueError, "got ('tensor',)", parallelize, model, other),
        "network": refuses(
            ValueError, "a Linear cannot share", parallelize, torch.nn.Linear(1, 1), shared
        ),
        "heads": refuses(
            ValueError, "must divide the heads of the network, got 2", parallelize, two, shared
        ),
        "replicas": refuses(ValueError, "must be the first", parallelize, model, late),
        "dtype": refuses(
            ValueError, "needs fsdp", parallelize, model, shared, fsdp=False, param_dtype=torch.half
        ),
    }
