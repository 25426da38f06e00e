"""Numbers of GPUs: what a processor (SM) does in a cycle, what memory does in a second.

Processors, clocks, DRAM, FLOPs, sizes: NVIDIA's data sheets and white papers of the A100, H100,
H200, B200 and RTX PRO 6000 Blackwell; the clock is the boost at which their FLOPs are stated. What
units do in a cycle, and latencies: CUDA C++ Programming Guide, arithmetic throughput; Jia et al.,
Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking, 2018; Luo et al., Benchmarking
and Dissecting the NVIDIA Hopper GPU Architecture, 2024, which also has the 62 % of its FLOPs that
mma.sync reaches on Hopper; that of the B200 is a guess. What no sheet says was measured on an H200,
with the report in benchmarks/results/h200: the shares that a copy and a large matrix product reach,
and the time of a launch, which is that of a kernel with next to nothing to do.
"""

from dataclasses import dataclass

from lumina_kernels.sass import Instruction

PARTS = 4  # of a processor (SM); each issues one instruction of a warp per cycle
REGISTERS, BLOCKS = 65536, 32  # of a processor
SHARED_OF_A_BLOCK = 1024  # bytes that the driver takes

# What the unit of special functions does.
XU = {"MUFU", "F2F", "F2I", "I2F", "FRND", "FLO", "POPC", "BREV"}


@dataclass(frozen=True)
class Machine:
    """A GPU. Rates of a processor are per cycle."""

    name: str
    arch: int
    processors: int
    ghz: float
    dram: float  # bytes/s
    flops: int  # of dense 16-bit products that add up float32
    shared_kib: int  # of a processor
    warps: int = 64
    sync_share: float = 1.0  # of `flops` that mma.sync reaches
    fma_lanes: int = 32  # of a part
    l2: int = 64  # bytes that it can take from the L2 cache
    # Cycles until the result is there.
    dram_latency: int = 800
    l2_latency: int = 280

    # Share of DRAM's rate that a copy reaches, and seconds from the end of one kernel to the end of
    # an empty next one.
    copy_share = 0.88
    launch = 3.8e-6
    # Share of `flops` that a large matrix product reaches: the clock falls under it.
    product_share = 0.81

    @property
    def copy_rate(self) -> float:
        return self.copy_share * self.dram

    @property
    def tensor_rate(self) -> float:
        """FLOPs per second of the tensor cores, as the data sheet has it."""
        return self.flops * self.processors * self.ghz * 1e9

    def tensor_cycles(self, x: Instruction) -> float:
        """That a tensor core is busy with an instruction of one warp. Hopper's reads 16 values of
        64 rows in 16 cycles, with however few columns these are multiplied."""
        if x.kind == "HGMMA":
            return max(16.0, x.flops * PARTS / self.flops) / self.product_share
        return x.flops * PARTS / (self.flops * self.sync_share * self.product_share)


A100 = Machine("A100", 80, 108, 1.41, 2.039e12, 2048, 164, fma_lanes=16)
H100 = Machine("H100", 90, 132, 1.83, 3.35e12, 4096, 228, sync_share=0.62)
H200 = Machine("H200", 90, 132, 1.83, 4.8e12, 4096, 228, sync_share=0.62)
B200 = Machine("B200", 100, 148, 1.85, 8.0e12, 8192, 228, sync_share=0.25)
RTX = Machine("RTX PRO 6000", 120, 188, 2.617, 1.792e12, 1024, 100, warps=48)
MACHINES = {machine.name: machine for machine in (A100, H100, H200, B200, RTX)}
