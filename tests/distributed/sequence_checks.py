"""What each process computes twice: with the tokens of the others, and alone with all of them."""

import functools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from processes import error, mean, refuses
from torch.distributed.device_mesh import init_device_mesh

from lumina.distributed.sequence import SequenceParallel
from lumina_kernels import gqa_attention

sys.path.append(str(Path(__file__).parent.parent / "ops"))  # for `eager`


@functools.cache
def over(ring, ulysses):
    """Of so many processes; the others do the same with the same sequence."""
    shape = dist.get_world_size() // (ring * ulysses), ring, ulysses
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "ring", "ulysses"))
    return SequenceParallel.from_mesh(mesh)


def attention_inputs(
    mesh, H=8, G=2, L=16, T=0, mask=None, text_mask="2d", bias=False, dtype=torch.float32
):
    """Of the whole sequence; two samples."""
    B, K, parallel = 2, 8, over(*mesh)
    C = -(-L // parallel.size)
    inputs = {name: torch.randn(B, L, n, K).to(dtype) for name, n in (("q", H), ("k", G), ("v", G))}
    if mask is not None:
        valid = torch.rand(B, L) < 0.7
        if mask == "a rank without keys":
            valid[:, C : 2 * C] = False
        elif mask == "ragged":
            valid = torch.arange(L) < torch.tensor([[L], [L // 3]])
        elif mask == "a sample without keys":
            valid[1] = False
        inputs["key_mask"] = valid
    if bias:
        inputs["bias"] = torch.randn(B, 1, 1, L).to(dtype)
    if T:
        inputs["text_k"], inputs["text_v"] = (torch.randn(B, T, G, K).to(dtype) for _ in range(2))
        inputs["text_gate"] = torch.randn(H).to(dtype)
        shape = (B, T) if text_mask == "2d" else (B, L, T)
        inputs["text_mask"] = None if text_mask is None else torch.rand(shape) < 0.6
    return inputs, parallel


def leaves_of(inputs):
    return {
        name: x.detach().clone().requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def results(out, leaves):
    """The output and the gradients of all floating inputs; different ones along every dimension."""
    weights = torch.arange(out.numel()).mul(7).remainder(17).sub(8).div(8).view(out.shape)
    (out * weights.to(out)).sum().backward()
    grads = {f"d{name}": x.grad for name, x in leaves.items() if x is not None and x.requires_grad}
    return {"out": out.detach(), **grads}


def in_parts(inputs, parallel, backend):
    leaves = leaves_of(inputs)
    q, k, v = (parallel.shard(leaves[name], 1) for name in "qkv")
    rest = {name: x for name, x in leaves.items() if name.startswith("text")}
    if rest.get("text_mask") is not None and rest["text_mask"].ndim == 3:
        rest["text_mask"] = parallel.shard(rest["text_mask"], 1)
    if "bias" in leaves:
        rest["bias"] = parallel.shard(leaves["bias"], 3)
    mask = parallel.key_mask(inputs.get("key_mask"), leaves["q"])
    out = parallel.attention(q, k, v, mask, **rest, backend=backend)
    out = parallel.gather(out, 1, inputs["q"].shape[1])
    found = results(out, leaves)
    return {"out": found.pop("out"), **mean(found)}


def attention_in_parts(mesh, backend=None, **changes):
    inputs, parallel = attention_inputs(mesh, **changes)
    leaves = leaves_of(inputs)
    expected = results(gqa_attention(**leaves, backend=backend), leaves)
    found = in_parts(inputs, parallel, backend)
    return {name: error(found[name], value, floor=1e-3) for name, value in expected.items()}


def attention_in_16_bits(mesh, **changes):
    """Errors as multiples of what the accuracy rule allows, twice those of eager PyTorch."""
    from attention import eager

    inputs, parallel = attention_inputs(mesh, dtype=torch.bfloat16, **changes)
    leaves = leaves_of(inputs)
    low = results(eager(**leaves), leaves)
    wide = leaves_of({n: x.double() if x.is_floating_point() else x for n, x in inputs.items()})
    high, found = results(eager(**wide), wide), in_parts(inputs, parallel, None)
    tiny = 8 * torch.finfo(torch.float32).eps
    return {
        name: max(
            float(
                norm(found[name].double() - x) / (2 * norm(low[name].double() - x) + tiny * norm(x))
            )
            for norm in (torch.linalg.vector_norm, lambda z: z.abs().max())
        )
        for name, x in high.items()
    }


def refused(mesh):
    """What does not fit is an error that says what came, on all ranks and before any exchange."""
    parallel, x = over(*mesh), torch.zeros(1, 2, 6, 8)
    few, y, mask = x[:, :, :2], torch.cat([x, x[:, :, :2]], 2), torch.ones(1, 2, dtype=torch.bool)
    four = "the 4 ranks of a Ulysses group must divide the heads of q, got 6"
    attention, other = parallel.attention, init_device_mesh("cpu", (4,), mesh_dim_names=("data",))
    return {
        "heads": refuses(ValueError, four, attention, x, few, few),
        "groups": refuses(
            ValueError, "divides the 6 of q, got 4", attention, x, *[x[:, :, :4]] * 2
        ),
        "tokens": refuses(ValueError, "k must have shape", attention, x, x[:, :1], x),
        "dtype": refuses(TypeError, "k must have the dtype of q", attention, x, few.double(), few),
        "mask": refuses(ValueError, "key_mask must have", attention, y, few, few, mask[:, :1]),
        "bias": refuses(ValueError, "bias must have", attention, y, few, few, bias=x),
        "length": refuses(ValueError, "9 tokens on 4 ranks are 3", parallel.gather, x, 1, 9),
        "mesh": refuses(ValueError, "got ('data',)", SequenceParallel.from_mesh, other),
    }
