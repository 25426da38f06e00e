"""A network of which each process has some tokens, compared with the same network by itself."""

import copy
import dataclasses
import os
import re
import tempfile
from pathlib import Path
from unittest import mock
from unittest.mock import DEFAULT

import joint_networks
import torch
import torch.distributed as dist
from networks import cast, config, inputs, randomise
from processes import error, mean
from sequence_checks import over
from torch.distributed.device_mesh import init_device_mesh

import lumina
from benchmarks.scale.counted import kept_bytes
from lumina import ContextDrop, Guidance, NextDiT, RopeScaling, sample
from lumina.distributed.guidance import GuidanceParallel

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
EIGHT_ON_TWO = dict(dim=64, n_heads=8, n_kv_heads=2)
DROP = ContextDrop(factor=2).at(0.0, 2)


def network(heads, backend=None):
    return randomise(NextDiT(config(**heads), backend), torch.float32).float()


def joint_network(family):
    """Of four query heads: on two key/value heads, or on as many."""
    groups = 2 if family == "lumina2" else 4
    sizes = dict(dim=96, n_heads=4, n_kv_heads=groups, axes_dims=(8, 8, 8), n_layers=2)
    config = dataclasses.replace(joint_networks.CONFIGS[family], **sizes, n_refiner_layers=1)
    model = joint_networks.NETWORKS[type(config)](config)
    return randomise(model, torch.float32).float()


def results(model, x, t, feats, mask, weights, **settings):
    """The velocity, and the gradients of the parameters, of the picture and of the text."""
    x = [z.clone().requires_grad_() for z in (x if isinstance(x, list) else [x])]
    feats = feats.clone().requires_grad_()
    model.zero_grad()
    out = model(x if len(x) > 1 else x[0], t, feats, mask, **settings)
    flat = torch.cat([z.flatten() for z in out])
    (flat * weights[: flat.numel()]).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    grads |= {f"x {i}": z.grad for i, z in enumerate(x)} | {"text": feats.grad}
    return flat.detach(), grads


def with_captions(arguments, captions):
    """In float32, with one or two captions for each picture."""
    x, t, feats, mask = cast(arguments, torch.float32)
    if captions > 1:
        feats, mask = torch.cat([feats, feats.flip(0)]), torch.cat([mask, mask.flip(0)])
    return x, t, feats, mask


def network_in_parts(mesh, size, heads=EIGHT_ON_TWO, regions=False, captions=1, **settings):
    x, t, feats, mask = with_captions(inputs(*size), captions)
    if regions:
        tokens = size[1] // 2 * (size[2] // 2)
        mask = torch.rand(mask.shape[0], tokens, mask.shape[1]) < 0.6
    return compared(network(heads), mesh, (x, t, feats, mask), "wk", settings)


def joint_in_parts(mesh, family, sizes, captions=1, **settings):
    arguments = with_captions(joint_networks.inputs(*sizes), captions)
    return compared(joint_network(family), mesh, arguments, "qkv", settings)


def compared(model, mesh, arguments, keys, settings):
    """Output and gradients of the processes of a mesh, and of this one alone."""
    arguments = (*arguments, torch.randn(10_000))
    out, grads = results(model, *arguments, **settings)
    model.sequence_parallel = over(*mesh)
    found, found_grads = results(model, *arguments, **settings)
    errors = {"out": error(found, out)}
    # A bias of all keys shifts the scores of a query alike: its gradient is rounding alone.
    sizes = {name: x.abs().max().item() for name, x in grads.items()}
    floors = {name: sizes[name.replace("ky_norm.bias", "ky_norm.weight")] for name in sizes}
    found_grads = mean(found_grads)
    errors |= {name: error(found_grads[name], x, floors[name]) for name, x in grads.items()}
    assert sizes[f"layers.0.attention.{keys}.weight"] > 1e-3 and sizes["x 0"] > 1e-3
    return errors


def drawn_in_parts(mesh, family="next_dit"):
    """`lumina.sample` with all there is, and prepared captions."""
    if family == "next_dit":
        model = network(EIGHT_ON_TWO)
        _, _, feats, mask = cast(inputs(3, 8, 8), torch.float32)
    else:
        model = joint_network(family)
        _, _, feats, mask = cast(joint_networks.inputs((8, 8)), torch.float32)
    settings = dict(
        size=(14, 10), steps=2, guidance=Guidance(3.0), context_drop=ContextDrop(),
        rope_scaling=RopeScaling("time_aware", base_size=2), base_seqlen=9,
    )  # fmt: skip

    def drawn():
        seed = torch.Generator().manual_seed(1)
        texts = feats, mask, feats[:1] / 2, mask[:1]
        return sample(model, *texts, **settings, generator=seed).latents

    expected = drawn()
    model.sequence_parallel = over(*mesh)
    model = copy.deepcopy(model)  # as an EMA is made
    found = drawn()
    return {"out": error(found, expected)}


def guided_in_parts(family, ragged=False, solver="midpoint"):
    """`lumina.sample` on pairs of processes; guidance ends before the last step."""
    if family == "next_dit":
        model = network(EIGHT_ON_TWO)
        _, _, feats, mask = cast(inputs(3, 8, 8), torch.float32)
    else:
        model = joint_networks.pair(family, torch.float32, None)[0]
        feats = torch.randn(2, 5, model.config.cap_feat_dim)
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    settings = dict(
        size=[(8, 4 + 4 * (i % 2)) for i in range(len(feats))] if ragged else (8, 4),
        steps=3, solver=solver, guidance=Guidance(3.0, until=0.8),
    )  # fmt: skip

    def drawn():
        seed = torch.Generator().manual_seed(1)
        texts = feats, mask, feats[:1, :2] / 2, mask[:1, :2]
        found = sample(model, *texts, **settings, generator=seed).latents
        return torch.cat([x.flatten() for x in found])

    expected = drawn()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "guidance"))
    model.guidance_parallel = GuidanceParallel.from_mesh(mesh)
    batches = []
    model.register_forward_pre_hook(lambda _, arguments: batches.append(arguments))
    found = drawn()
    captions = [len(a[2].mask) for a in batches if len(a) > 2]
    assert captions and set(captions) == {len(feats)}  # never the batch of both
    return {"out": error(found, expected)}


def keeps_its_share(mesh, family="next_dit"):
    """Of what a forward keeps for its backward: 1 / ranks, and at most 15 % of that besides."""
    if family == "next_dit":
        model, arguments = network(EIGHT_ON_TWO), cast(inputs(3, 32, 30), torch.float32)
    else:
        model = joint_network(family)
        x, t, feats, mask = cast(joint_networks.inputs((48, 40)), torch.float32)
        # The text's refiner, which every rank runs, is a third of these few blocks.
        arguments = x, t, feats[:, :5], mask[:, :5]
    parallel = over(*mesh)

    def forward():
        assert model(*arguments).requires_grad

    whole = kept_bytes(model, forward)
    model.sequence_parallel = parallel
    share = kept_bytes(model, forward) / whole
    assert share > 0.9 / parallel.size
    return {"kept": max(0.0, share * parallel.size - 1.15)}


def documented(_):
    """The first program of docs/distributed.md, among the processes that there are."""
    program = re.search(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    here, names = os.getcwd(), {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with mock.patch.multiple(
                dist, init_process_group=DEFAULT, destroy_process_group=DEFAULT
            ):
                exec(compile(program, PAGE.name, "exec"), names)
            assert os.listdir() == (["apple.png"] if dist.get_rank() == 0 else [])
        finally:
            os.chdir(here)
    names["model"].sequence_parallel = None
    noise = torch.Generator().manual_seed(0)
    texts = *names["caption"], *names["nothing"]
    alone = lumina.sample(names["model"], *texts, size=(32, 32), generator=noise).latents
    return {"out": error(names["pictures"], alone)}
