"""A case: an op or a model on one shape, and the variants that compute it.

A variant is one implementation: a backend of this package, eager PyTorch, `torch.compile` of that,
or another package (a peer).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Largest relative RMS distance from eager PyTorch. In 16 bits, eager's own rounding errors decide.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class Unavailable(Exception):
    """A variant that cannot run here; the message says why."""


@dataclass
class Case:
    """What is measured, and the work that no implementation can avoid.

    Args:
        inputs: keyword arguments of every variant.
        ours: variant -> function.
        eager: the function as users of PyTorch write it.
        bytes: what a fused kernel moves, that is, each input read once and each output written
            once; None where they are not counted.
        flops: FLOPs of the matrix products, without masked keys; None where there are none, or they
            are not counted.
        peers: variant -> function without arguments that returns the function. It raises
            Unavailable or ImportError where the peer cannot run.
        not_equivalent: variants that compute something other than eager does. Their results are not
            compared, and the bytes and FLOPs of the case are not theirs.
        model: a whole network. It is timed as a user calls it, not as a replayed CUDA graph.
        backward: include the gradients of all floating-point inputs.
        compiled: whether `torch.compile` of eager is a variant.
        threads: of PyTorch on the CPU while the case is measured; None leaves their number.
        info: more columns for every row.
        variant_info: variant -> more columns for its row.
    """

    inputs: dict
    ours: dict[str, Callable]
    eager: Callable
    bytes: int | None = None
    flops: int | None = None
    peers: dict[str, Callable] = field(default_factory=dict)
    not_equivalent: tuple[str, ...] = ()
    model: bool = False
    backward: bool = False
    compiled: bool = True
    threads: int | None = None
    info: dict = field(default_factory=dict)
    variant_info: dict[str, dict] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return self._floating_input().device.type

    @property
    def dtype(self) -> torch.dtype:
        return self._floating_input().dtype

    def _floating_input(self) -> Tensor:
        return next(value for value in self.inputs.values() if is_floating_tensor(value))


def variant_names(device: str, peers: tuple[str, ...], autotune: bool) -> tuple[str, ...]:
    """The variants of a case with these peers, ours first."""
    return (*our_variants(device), "eager", *compile_modes(device, autotune), *peers)


def compile_modes(device: str, autotune: bool) -> dict[str, str]:
    """Variant -> mode of `torch.compile`. The modes are those without CUDA graphs, because every
    variant is captured into one here."""
    modes = {"compile": "default"}
    if autotune and device == "cuda":
        modes["compile-max-autotune"] = "max-autotune-no-cudagraphs"
    return modes


def our_variants(device: str) -> tuple[str, ...]:
    return ("lumina-triton", "lumina-cuda") if device == "cuda" else ("lumina-cpu",)


def ours(op: Callable, device: str, **constants) -> dict[str, Callable]:
    """`Case.ours` of an op of this package. `constants` are arguments that need no gradient."""

    def variant(backend):
        return lambda **inputs: op(**inputs, **constants, backend=backend)

    return {name: variant(name.removeprefix("lumina-")) for name in our_variants(device)}


def caller(function: Callable, case: Case, inputs: dict) -> Callable[[], tuple]:
    """A function without arguments that calls a variant on these inputs.

    It returns the tensors among the results and, if `case.backward`, the gradients.
    """
    if not case.backward:
        return lambda: as_tuple(function(**inputs))
    leaves = [z.requires_grad_() for z in inputs.values() if is_floating_tensor(z)]

    def forward_and_backward():
        outs = [z for z in as_tuple(function(**inputs)) if z.requires_grad]
        douts = [torch.ones_like(out) for out in outs]
        return (*outs, *torch.autograd.grad(outs, leaves, douts))

    return forward_and_backward


def difference(name: str, results: tuple, expected: tuple) -> float:
    """RMS of (results - expected) over the RMS of expected, of all tensors together.

    Raises:
        AssertionError: rounding does not explain the difference: the variant `name` computes
            something else.
    """
    assert len(results) == len(expected), f"{name} returns {len(results)}, not {len(expected)}"
    pairs = [(a.double(), b.double()) for a, b in zip(results, expected, strict=True)]
    distance = sum((a - b).square().sum().item() for a, b in pairs)
    size = sum(b.square().sum().item() for _, b in pairs)
    relative = (distance / size) ** 0.5 if size > 0 else distance**0.5
    allowed = TOLERANCE[next(z.dtype for z in expected if is_floating_tensor(z))]
    assert relative <= allowed, f"{name} differs from eager by {relative:.2g} (RMS)"
    return relative


def as_tuple(results) -> tuple:
    """The tensors among a function's results."""
    results = results if isinstance(results, (tuple, list)) else (results,)
    return tuple(z for z in results if isinstance(z, Tensor))


def is_floating_tensor(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
