"""Small networks with random weights, ours and the reference, and inputs for them."""

import math

import torch
from common import DEVICE

from lumina import NextDiT, NextDiTConfig, reference

# Changes of the config for other kinds of data, and the size of an image.
AUDIO = dict(axes=("w",), dim=48, n_heads=2, n_kv_heads=2, patch_size=1, in_channels=5)
VIDEO = dict(axes=("t", "h", "w"), dim=96, n_heads=4, n_kv_heads=2)
IMAGE = (3, 4, 6)
# Texts of 5 tokens: all of them, holes, none.
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
T = torch.tensor([0.25, 0.5, 0.875])  # the same numbers in every dtype


def randn(*shape):
    """Drawn on the CPU, so the same on every device."""
    return torch.randn(shape, dtype=torch.float64).to(DEVICE)


def config(**changes):
    """Head width 72 as in the released model, two query heads on one key/value head."""
    sizes = dict(patch_size=2, in_channels=3, dim=144, n_layers=2, n_heads=2, n_kv_heads=1)
    return NextDiTConfig(**{**sizes, "multiple_of": 32, "cap_feat_dim": 24, **changes})


def randomise(model, dtype=torch.float64):
    """Random values for every parameter, those that start as 0 or 1 too, as numbers of `dtype`."""
    for name, p in model.named_parameters():
        noise = randn(*p.shape)
        if p.ndim == 2:
            noise /= math.sqrt(p.shape[1])
        elif "norm" in name and name.endswith("weight") or name == "cap_embedder.0.weight":
            noise = 1 + 0.3 * noise
        p.data = noise.to(p.device, dtype).double()
    return model


def pair(dtype=torch.float64, backend="torch", **changes):
    """Ours and the reference with the same weights, in float64."""
    sizes = config(**changes)
    theirs = randomise(reference.NextDiT(sizes).to(DEVICE), dtype)
    ours = NextDiT(sizes, backend=backend).to(DEVICE, torch.float64)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(*size, dtype=torch.float64, cap_feat_dim=24):
    """x, t, cap_feats, cap_mask for three images of `size` (C, ...), or three sizes."""
    size = [size] * 3 if isinstance(size[0], int) else size
    x = [randn(*s).to(dtype).double() for s in size]
    x = torch.stack(x) if len(set(size)) == 1 else x
    feats = randn(3, 5, cap_feat_dim).to(dtype).double()
    return x, T.to(DEVICE, torch.float64), feats, MASK.to(DEVICE)


def cast(arguments, dtype):
    x, t, feats, mask = arguments
    x = [xi.to(dtype) for xi in x] if isinstance(x, list) else x.to(dtype)
    return x, t.to(dtype), feats.to(dtype), mask


def run(model, arguments, **settings):
    """Outputs, and the gradients of the parameters, of x and of cap_feats, by name."""
    x, t, feats, mask = arguments
    x = [xi.detach().requires_grad_() for xi in (x if isinstance(x, list) else [x])]
    feats = feats.detach().requires_grad_()
    model.zero_grad()
    out = model(x if isinstance(arguments[0], list) else x[0], t, feats, mask, **settings)
    out = out if isinstance(out, list) else [out]
    for o in out:  # whole eighths are the same number in every dtype
        dout = torch.arange(o.numel()).mul(7).remainder(17).sub(8).div(8).view(o.shape)
        o.backward(dout.to(o), retain_graph=True)
    results = {f"out {i}": o.detach() for i, o in enumerate(out)}
    results |= {f"dx {i}": xi.grad for i, xi in enumerate(x)} | {"dcap_feats": feats.grad}
    grads = {name: p.grad for name, p in model.named_parameters()}
    pad = grads.pop("pad_token", None)
    assert pad is None or not pad.any()  # padding has no influence
    return results | grads


def sizes_of(high):
    """RMS of every result; ky_norm.bias shifts the scores of a query alike, its gradient is 0."""
    rms = {name: value.square().mean().sqrt() for name, value in high.items()}
    return {name: rms[name.replace("ky_norm.bias", "ky_norm.weight")] for name in rms}


def grouped(results, high):
    """Results over their RMS: the outputs, the large gradients, and the small ones together, since
    in few numbers the size of the rounding error is luck."""
    rms, groups = sizes_of(high), {}
    for name in sorted(high):
        group = "outputs" if name.startswith("out ") else name
        group = "small gradients" if high[name].numel() < 1000 and group == name else group
        size = rms[name].clamp(min=1e-30)  # 0: without influence
        groups.setdefault(group, []).append((results[name].double() / size).flatten())
    return {name: torch.cat(parts) for name, parts in groups.items()}
