"""gqa_attention: self-attention with grouped queries, key masks and the gated text branch."""

import warnings
from importlib import import_module

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import lumina_kernels as lk
from benchmarks.harness.case import Case, Unavailable, as_tuple, ours
from benchmarks.harness.hopper import HOPPER, is_there, on_hopper
from benchmarks.harness.shapes import BACKWARD_SHAPES, CPU, CUDA, LUMINA_NEXT, OP_SHAPES, QUARTER
from lumina_kernels.ops.gqa_attention import gqa_attention_flops

SHAPES = (
    # 515 GFLOP take seconds on a CPU.
    *(shape.but(devices=CUDA) if shape.model == "z-image" else shape for shape in OP_SHAPES),
    LUMINA_NEXT.but(valid=0.75),
    LUMINA_NEXT.but(valid=0.5, devices=CUDA),
    QUARTER.but(side=32, valid=0.75, devices=CPU),
    QUARTER.but(side=32, valid=0.5, devices=CPU),
    QUARTER.but(valid=0.75, devices=CPU),
    QUARTER.but(valid=0.5, devices=CPU),
    LUMINA_NEXT.but(text=True, devices=CUDA),
    QUARTER.but(side=32, text=True, devices=CPU),
    *BACKWARD_SHAPES,
)
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
FLASH_ATTN = {
    "flash-attn-2": "flash_attn.flash_attn_interface",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-4": "flash_attn.cute",
}
PEERS = (HOPPER, *SDPA, "flex", *FLASH_ATTN, "sage")
MAX_SCORE_BYTES = 2**31  # of the score matrix that sdpa-math allocates


def case(shape, device) -> Case:
    B, L, H, G, K, randn = shape.B, shape.L, shape.H, shape.G, shape.K, shape.randn(device)
    keys, T, key_mask = round(shape.valid * L), shape.text * shape.T, None
    inputs = {"q": randn(B, L, H, K), "k": randn(B, L, G, K), "v": randn(B, L, G, K)}
    if keys < L:
        inputs["key_mask"] = key_mask = (torch.arange(L, device=device) < keys).repeat(B, 1)
    if T:
        inputs |= {"text_k": randn(B, T, G, K), "text_v": randn(B, T, G, K), "text_gate": randn(H)}

    def peer(make, *arguments):
        return lambda: first_that_runs([with_text(z) for z in make(*arguments)], inputs)

    numbers = 2 * B * L * (H + G) * K + 2 * B * T * G * K + H * shape.text
    unmasked, text = (B, keys, G, K), (B, T, G, K)
    flops = gqa_attention_flops(inputs["q"].shape, unmasked, unmasked, None, None, text)
    return Case(
        inputs=inputs,
        ours=ours(gqa_attention, device),
        # With a mask, not every GPU kernel takes grouped heads, and the math fallback is slow.
        eager=with_text(sdpa_of_repeated if device == "cuda" and keys < L else sdpa),
        peers={
            HOPPER: hopper,
            **{name: peer(sdpa_on, backend, shape) for name, backend in SDPA.items()},
            "flex": peer(flex, key_mask),
            **{name: peer(flash_attn, module, device) for name, module in FLASH_ATTN.items()},
            "sage": peer(sage, device),
        },
        not_equivalent=("sage",),  # its matrix products are in 8 bits
        bytes=None if shape.backward else numbers * inputs["q"].itemsize + (keys < L) * B * L,
        flops=None if shape.backward else flops,
        backward=shape.backward,
    )


def gqa_attention(**arguments):
    try:
        return lk.gqa_attention(**arguments)
    except NotImplementedError as error:  # its tiles do not fit this GPU
        raise Unavailable(str(error)) from None


def hopper():
    """Our forward for Hopper by wgmma; the gradient is that of the CUDA backend."""
    if not is_there():
        raise Unavailable("this is no Hopper GPU")

    def call(**arguments):
        with on_hopper():
            return gqa_attention(**arguments, backend="cuda")

    return call


def with_text(attend):
    """Self-attention by `attend`, plus gated attention to the text by a second call of it."""

    def attend_to_both(q, k, v, key_mask=None, text_k=None, text_v=None, text_gate=None):
        out = attend(q, k, v, key_mask)
        if text_k is None:
            return out
        return out + text_gate.tanh()[:, None] * attend(q, text_k, text_v, None)

    return attend_to_both


def first_that_runs(functions, inputs):
    """The first of the functions that accepts these inputs.

    Raises:
        Unavailable: none does; the message has their errors and warnings.
    """
    errors = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for attend in functions:
            try:
                has_gradient = attend(**inputs).requires_grad
            except (AssertionError, RuntimeError, ValueError) as error:
                errors.append(error)
                continue
            if inputs["q"].requires_grad and not has_gradient:
                raise Unavailable("it has no gradient")
            return attend
    texts = (str(z) or repr(z) for z in (*errors, *(warning.message for warning in caught)))
    lines = (text.partition("\n")[0].partition(" (Triggered")[0] for text in texts)
    # SDPA also warns about the kernels that sdpa_kernel disabled.
    reasons = dict.fromkeys(z for z in lines if not z.endswith(("disabled.", ":")))
    raise Unavailable("; ".join(reasons))


def sdpa(q, k, v, key_mask):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if key_mask is None else key_mask[:, None, None]
    grouped = q.shape[1] > k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2)


def sdpa_of_repeated(q, k, v, key_mask):
    """Keys and values are repeated for every query head, as diffusers' Lumina-Next does it."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    return sdpa(q, k, v, key_mask)


def sdpa_on(backend, shape):
    """SDPA by one of its kernels, and with repeated keys in case that takes no grouped heads."""
    scores = 4 * shape.B * shape.H * shape.L**2
    if backend == SDPBackend.MATH and scores > MAX_SCORE_BYTES:
        raise Unavailable(f"its scores take {scores / 2**30:.0f} GiB")

    def on_backend(attend):
        def call(*arguments):
            with sdpa_kernel(backend):
                return attend(*arguments)

        return call

    return on_backend(sdpa), on_backend(sdpa_of_repeated)


def flex(key_mask):
    compiled, blocks = torch.compile(flex_attention, dynamic=False), None
    if key_mask is not None:
        B, L = key_mask.shape
        blocks = create_block_mask(
            lambda b, h, row, key: key_mask[b, key], B, None, L, L, device=key_mask.device
        )

    def attend(q, k, v, key_mask):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if key_mask is None else blocks
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return (attend,)


def flash_attn(module, device):
    if device != "cuda":
        raise Unavailable("flash-attn's kernels run only on a GPU")
    flash_attn_func = import_module(module).flash_attn_func

    def attend(q, k, v, key_mask):
        if key_mask is not None:
            raise Unavailable("flash_attn_func takes no key mask")
        return as_tuple(flash_attn_func(q, k, v))[0]  # version 4 also returns the log-sum-exp

    return (attend,)


def sage(device):
    if device != "cuda":
        raise Unavailable("SageAttention's kernels run only on a GPU")
    from sageattention import sageattn

    def attend(q, k, v, key_mask):
        if key_mask is not None:
            raise Unavailable("sageattn takes no key mask")
        # A clone: sageattn subtracts the mean from k in place, and other variants need k.
        return sageattn(q, k.clone(), v, tensor_layout="NHD")

    return (attend,)


def test_gqa_attention(compare):
    compare(case)
