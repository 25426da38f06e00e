"""Norms that are fused with the operations around them where possible, and called otherwise.

A fused op takes a norm's weight, bias and eps, by name. That equals a call only where the module is
exactly one of the classes below and nothing has been put around its forward. Everything else (a
subclass, a parametrization, a wrapper of PEFT, a forward or backward hook) is called, and the
arithmetic around it is plain PyTorch. Hooks on all modules of a process
(`torch.nn.modules.module.register_module_forward_hook`) do not see the fused norms.

A sub-layer adds tanh(gate) * norm(out), or norm(out) alone, to the residual stream h. That pass
over memory can make the input of the next sub-layer too, so a sub-layer hands on a carry (h, out,
weight, gate) instead of the sum; where its post-norm had to be called, the sum is done and the
carry is (sum, None, None, None).
"""

from __future__ import annotations

from torch import Tensor, nn

from lumina_kernels import norm_modulate, sandwich_norm, sandwich_norm_chain

Carry = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


class _Norm(nn.Module):
    def forward(self, x: Tensor | None = None):
        """norm(x) in the dtype of x; without x, weight and bias.

        Fused ops use the second form: hooks that load the parameters for the duration of a call
        (offloading) then run too.
        """
        if x is None:
            # Copies: the hook may move or cast the parameters when the call ends.
            return self.weight.clone(), None if self.bias is None else self.bias.clone()
        return super().forward(x).to(x.dtype)


class RMSNorm(_Norm, nn.RMSNorm):
    """nn.RMSNorm, fused where it can be."""

    kind, bias = "rms", None


class LayerNorm(_Norm, nn.LayerNorm):
    """nn.LayerNorm, fused where it can be."""

    kind = "layer"


def parameters(norm: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias for a fused op, or None where the norm has to be called."""
    if type(norm) not in (RMSNorm, LayerNorm):
        return None
    if norm._forward_hooks or norm._forward_pre_hooks:
        return None
    if norm._backward_hooks or norm._backward_pre_hooks:
        return None
    if "forward" in norm.__dict__:
        # accelerate and diffusers move parameters around a call by replacing forward.
        moved = hasattr(norm, "_hf_hook") or hasattr(norm, "_diffusers_hook")
        return norm() if moved else None
    return norm.weight, norm.bias


def modulate(norm: nn.Module, x: Tensor, scale: Tensor | None, backend: str | None) -> Tensor:
    """norm(x) * (1 + scale), for x (B, L, D) and scale (B, D) or None."""
    fused = parameters(norm)
    if fused is not None:
        return norm_modulate(x, *fused, scale=scale, eps=norm.eps, kind=norm.kind, backend=backend)
    normed = norm(x)
    if scale is not None:
        normed = normed * (1 + scale[:, None])
    return normed.to(x.dtype)


def post_norm(norm: nn.Module, out: Tensor, h: Tensor, gate: Tensor | None, eps: float) -> Carry:
    """The carry of h + tanh(gate) * norm(out), for out and h (B, L, D), gate (B, D) or None: 1.

    eps is the epsilon of the network's norms; the fused op takes one for both norms.
    """
    fused = parameters(norm)
    if fused is not None and norm.eps == eps:
        return h, out, fused[0], gate
    out = norm(out) if gate is None else gate.tanh()[:, None] * norm(out)
    return (h + out).to(h.dtype), None, None, None


def pre_norm(
    norm: nn.Module, scale: Tensor, carry: Carry, eps: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """The sum h that a carry stands for, and norm(h) * (1 + scale), in one pass where it can be."""
    h, out, weight, gate = carry
    fused = parameters(norm)
    if out is not None and fused is not None and norm.eps == eps:
        return sandwich_norm_chain(out, h, weight, gate, fused[0], scale, eps, backend=backend)
    h = residual_sum(carry, eps, backend)
    return h, modulate(norm, h, scale, backend)


def residual_sum(carry: Carry, eps: float, backend: str | None) -> Tensor:
    """The h that a carry stands for."""
    h, out, weight, gate = carry
    if out is None:
        return h
    return sandwich_norm(out, h, weight, gate, eps, backend=backend)
