"""On Blackwell's data-centre GPUs attention is compared with its definition before its first use.

Triton 3.6 to 3.8 moves products that add to one sum into different stages of a loop there, and some
kernels then give sums that are wrong by half, without an error (triton issue 10821). Ours add up
the parts of a head in that way, though not across iterations, which is what fails there.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Of the RMS. In bfloat16 it is 0.005; the sums of that issue are off by 0.46.
LARGEST_ERROR = 0.05

# Heads, queries, keys and keys of the text: loops over several tiles.
SIZES = 2, 96, 300, 80

# The errors of the variants that this process has used.
_errors: dict[tuple, float] = {}


def prove(
    fwd: Callable, bwd: Callable | None, q: Tensor, key_mask, text_k, text_mask, bias
) -> None:
    """Try the launchers, the backward unless it is None, on a small input of the same kind as the
    given arguments, of which the bias comes as for the kernels. That waits for the GPU, so call
    the op before a CUDA graph is recorded.

    Raises:
        RuntimeError: a result is wrong.
    """
    own = text_mask is not None and text_mask.ndim == 3
    optional = key_mask is not None, text_k is not None, own, len(bias or ())
    key = (q.device, q.dtype, q.shape[-1], *optional, bwd is not None)
    if key not in _errors:
        _errors[key] = 0.0  # the trial itself comes along here
        _errors[key] = _trial(fwd, bwd, q, *optional)
    if not _errors[key] <= LARGEST_ERROR:
        raise RuntimeError(
            f"this version of Triton miscompiles gqa_attention for this GPU (head_dim "
            f"{q.shape[-1]}, {q.dtype}): the relative error is {_errors[key]:.2g}. Use a newer "
            "Triton, or backend='torch' or 'cuda'"
        )


def _trial(
    fwd, bwd, like: Tensor, masked: bool, with_text: bool, own: bool, bias_kind: int
) -> float:
    """The largest relative error of the results. own: every query has text of its own; bias_kind:
    the length of its tuple, 0 for none."""
    (H, L, M, T), K = SIZES, like.shape[-1]
    generator = torch.Generator(like.device).manual_seed(0)

    def normal(*shape):
        drawn = torch.randn(shape, generator=generator, device=like.device)
        return drawn.to(like.dtype)

    q, dout, gate = normal(1, L, H, K), normal(1, L, H, K), normal(H)
    k, v, text_k, text_v = (normal(1, count, 1, K) for count in (M, M, T, T))
    mask = torch.arange(M, device=like.device)[None] % 3 != 1 if masked else None
    bias = normal(1, 1, 1, M) if bias_kind == 3 else normal(1, H, L, M) if bias_kind else None
    tokens, texts = (torch.arange(count, device=like.device) for count in (L, T))
    text_mask = ((tokens[:, None] + texts) % 3 != 1)[None] if own else None
    text = (text_k, text_v, text_mask, gate) if with_text else (None,) * 4
    given = q, k, v, mask, K**-0.5, *text, bias
    out, *kept = fwd(*given, bwd is not None)
    found = [out]
    if bwd is not None:
        found += bwd(dout, out, *kept, *given, False)[: 5 if with_text else 3]

    expected, dq, dk, dv = _attend(q, k, v, dout, mask, bias)
    grads = [dq, dk, dv]
    if with_text:
        t = gate.float().tanh()[:, None]
        text_out, text_dq, *text_grads = _attend(q, text_k, text_v, dout * t, text_mask, None)
        expected, grads = expected + t * text_out, [dq + text_dq, dk, dv, *text_grads]
    pairs = zip(found, [expected, *grads], strict=False)
    errors = [(x.float() - y).norm() / y.norm() for x, y in pairs]
    return torch.stack(errors).max().nan_to_num(torch.inf).item()


def _attend(q, k, v, dout, mask, bias) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """softmax(q kᵀ / sqrt(K) + bias) v for one key/value head, and the gradients of q, k and v."""
    q, k, v, dout = (x.float().transpose(1, 2) for x in (q, k, v, dout))  # (1, H or 1, L or M, K)
    scale = q.shape[-1] ** -0.5
    scores = q @ k.mT * scale
    if bias is not None:
        scores = scores + bias.float()
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 2 else mask
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    P = scores.softmax(-1)
    dP = dout @ v.mT
    dS = P * (dP - (P * dP).sum(-1, keepdim=True)) * scale
    dk, dv = (dS.mT @ q).sum(1, keepdim=True), (P.mT @ dout).sum(1, keepdim=True)
    return tuple(x.transpose(1, 2) for x in (P @ v, dS @ k, dk, dv))
