"""Rates of machines: what they compute, read, send, and what a call costs them."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.scale.plan import Exchange
from lumina_kernels import machine


@dataclass(frozen=True)
class Cluster:
    """Equal machines of several processors, one a rank.

    Args:
        matrix: FLOPs/s of matrix products.
        attention: FLOPs/s of attention's forward.
        backward: how many times as long its backward takes, with its forward not counted.
        copy: bytes/s of memory, read or written.
        launch: seconds of a kernel with nothing to do.
        node: ranks of a machine.
        inside, outside: bytes/s that a rank sends to one of its machine, to one of another.
        call, hop: seconds of an exchange, and of each step of a chain, inside and outside.
        host: seconds that Python takes for a layer's forward, and for an exchange in it; a backward
            takes as long, and autograd half as much again.
        overlaps: exchanges go on while the processor computes.
        launches: kernels of a layer's forward.
        memory: bytes of a rank.
    """

    name: str
    matrix: float
    attention: float
    backward: float
    copy: float
    launch: float = 0.0
    node: int = 8
    inside: float = 1.0
    outside: float = 1.0
    call: float = 0.0
    hop: tuple[float, float] = (0.0, 0.0)
    host: tuple[float, float] = (0.0, 0.0)
    overlaps: bool = True
    launches: int = 13
    memory: float = 80e9

    def seconds(self, x: Exchange) -> float:
        """Of one of these exchanges, alone on the links.

        NCCL's and gloo's chains: an all-gather or reduce-scatter of n ranks takes n - 1 steps, an
        all-reduce twice as many; where m ranks of each machine take part, m links lead out of it.
        """
        n = x.group
        if n == 1 or x.bytes == 0:
            return 0.0
        here = min(n, max(1, self.node // x.stride))  # ranks of the group on a machine
        alone = here == n
        if x.kind == "all_to_all":
            own = x.bytes * (here - 1) / (n - 1)
            return self.call + max(own / self.inside, (x.bytes - own) / self.outside)
        if x.kind == "send":
            return self.call + x.bytes / (self.inside if alone else self.outside)
        rate = self.inside if alone else min(self.inside, here * self.outside)
        if here == 1:
            rate = self.outside
        machines = -(-n // here)
        steps = (n - machines) * self.hop[0] + (machines - 1) * self.hop[1]
        return self.call + steps * (2 if x.kind == "all_reduce" else 1) + x.bytes / rate


# Attention in bfloat16 on an H200, forward, and dq, dk, dv over forward, by head_dim
# (benchmarks/results/h200/attention-tiles.md).
MEASURED_ATTENTION = {72: (337e12, 3.18), 96: (454e12, 3.66), 128: (511e12, 3.49)}
GPU = machine.H100


def h100(head_dim: int) -> Cluster:
    """Eight H100 SXM a machine, NVLink 4 inside, an InfiniBand NDR link for each outside.

    Assumptions, none of them measured on an H100 or between two of our processes on GPUs: kernels
    reach what they were measured to reach on an H200, which has the same processors at the same
    clock, and the same share of its own memory's rate; links reach 0.8 of NVLink's 450 GB/s and
    0.92 of InfiniBand's 50 GB/s a direction (NVIDIA's data sheets; 46 to 48 GB/s say NCCL's
    maintainers, NVIDIA/nccl-tests#290); an exchange takes 15 us, a step of a chain 1 us inside and
    5 us between machines. Python: 229 us for a layer's ops as measured on a CPU's two cores
    (benchmarks/results/speed.md), 9 us for each of its 8 products, 100 us for an exchange.
    """
    attention, backward = MEASURED_ATTENTION[head_dim]
    return Cluster(
        GPU.name, GPU.product_share * GPU.tensor_rate, attention, backward, GPU.copy_rate,
        GPU.launch, 8, 0.8 * 450e9, 0.92 * 50e9, 15e-6, (1e-6, 5e-6), (300e-6, 100e-6),
    )  # fmt: skip
