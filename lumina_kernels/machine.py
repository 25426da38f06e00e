"""Numbers of GPUs, and the time that a kernel should take on one by what is counted in its machine
code: a roofline of few terms. Nothing here was fitted to a kernel.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from lumina_kernels.sass import Function, Instruction, Loop

PARTS = 4  # of a processor (SM); each issues one instruction of a warp per cycle
REGISTERS, SHARED_OF_A_BLOCK, BLOCKS = 65536, 1024, 32

# Cycles a warp's instruction keeps one of the four units of its kind busy, and what goes there.
_XU = {"MUFU", "F2F", "F2I", "I2F", "FRND", "FLO", "POPC", "BREV"}
_FMA = {"FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2", "IMAD", "HFMA2", "HADD2", "HMUL2"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMS"}
_ELSEWHERE = _XU | _FMA | _SHARED | {
    "LDG", "STG", "LDGSTS", "LDC", "ULDC", "LDGDEPBAR", "DEPBAR", "BAR", "BRA", "EXIT", "NOP",
    "HMMA", "HGMMA", "WARPGROUP", "BSSY", "BSYNC", "S2R", "S2UR", "MEMBAR", "FENCE", "R2UR", "CS2R",
    "LDL", "STL", "SYNCS",
}  # fmt: skip


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


@dataclass(frozen=True)
class Launch:
    """A kernel as launched, and the work that it cannot avoid."""

    code: Function
    grid: int
    warps: int  # of a block
    registers: int  # of a thread
    shared: int  # bytes of a block
    bytes: int  # every input read once, every output written once
    flops: float = 0  # of matrix products, with the padding of their tiles


@dataclass(frozen=True)
class Prediction:
    seconds: float
    limit: str  # the largest of the terms
    terms: dict[str, float]  # seconds
    resident: int  # blocks that a processor holds
    waves: float
    in_flight: int  # most bytes of a processor's loads under way at once
    per_copy: float  # warp instructions issued while a copy would move the same bytes, over slots
    waits: float | None  # of Hopper's asynchronous products, per product, in the worst loop
    barriers: int  # of the hot loop, or of the whole kernel without one


def resident_blocks(launch: Launch, machine: Machine) -> int:
    """Blocks that a processor holds by registers, shared memory, warps."""
    of_a_warp = -(-launch.registers * 32 // 256) * 256
    warps = REGISTERS // PARTS // of_a_warp * PARTS
    by_registers = warps // launch.warps
    by_shared = (machine.shared_kib << 10) // (launch.shared + SHARED_OF_A_BLOCK)
    return max(1, min(BLOCKS, machine.warps // launch.warps, by_registers, by_shared))


def predict(launch: Launch, machine: Machine) -> Prediction:
    """The time of a launch, every term on its own, and the largest of them.

    A block's instructions are those of its hot path, its loops run as often as `loop_trips` says.
    The fullest processor runs ceil(grid / processors) blocks; it needs the time of each of its
    units, and that of one warp alone for every block that does not fit beside the others."""
    code = launch.code
    trips = loop_trips(launch)
    counts = _counts(code, code.body, trips, machine)
    clock = machine.ghz * 1e9
    blocks = -(-launch.grid // machine.processors)
    resident = resident_blocks(launch, machine)
    scale = blocks * launch.warps / clock
    read = 32 * launch.warps * launch.grid * counts["loaded"]
    again = max(0.0, 1 - launch.bytes / read) if read else 0.0
    latency = again * machine.l2_latency + (1 - again) * machine.dram_latency
    warp = Warp(machine, latency)
    alone = warp.run(code, code.body, trips)
    terms = {
        "copy": launch.bytes / machine.copy_rate,
        "L2": scale * 32 * counts["loaded"] / machine.l2,
        "issue": scale * counts["issue"] / PARTS,
        "ALU": scale * 2 * counts["alu"] / PARTS,
        "FMA": scale * (32 // machine.fma_lanes) * counts["fma"] / PARTS,
        "MUFU": scale * 8 * counts["xu"] / PARTS,
        "shared memory": scale * counts["shared"] / 128,
        "tensor": scale * counts["tensor"] / PARTS,
        "latency": -(-blocks // resident) * alone / clock,
    }
    limit = max(terms, key=terms.get)
    seconds = _queued(terms, -(-blocks // resident), resident, blocks, launch.warps)
    hot = hot_loop(code, launch.flops > 0)
    inner = code.straight(hot or code.body)
    slots = launch.bytes / machine.copy_rate * clock * PARTS * machine.processors
    return Prediction(
        seconds=machine.launch + seconds,
        limit=limit,
        terms=terms,
        resident=resident,
        waves=launch.grid / (resident * machine.processors),
        in_flight=32 * launch.warps * resident * warp.most_in_flight,
        per_copy=launch.grid * launch.warps * counts["issue"] / slots if slots else 0.0,
        waits=waits_per_product(code),
        barriers=sum(x.kind == "BAR" for x in inner),
    )


def _queued(terms: dict[str, float], rounds: int, resident: int, blocks: int, warps: int) -> float:
    """Seconds that the fullest processor takes for its blocks, `resident` at a time, when warps
    queue for what they share: mean value analysis (Reiser and Lavenberg, 1980) of a part's warps as
    the customers and its units, its share of the memory and its tensor core as the stations."""
    stations = (
        max(terms["copy"], terms["L2"]),
        max(terms[unit] for unit in ("issue", "ALU", "FMA", "MUFU", "shared memory")),
        terms["tensor"],
    )
    served = [z / blocks for z in stations]  # of a block, by all of the processor
    seconds, left = 0.0, blocks
    alone = terms["latency"] / rounds
    together = min(resident, blocks)
    while left > 0:
        now = min(left, together)
        count = max(1, round(now * warps / PARTS))  # of warps in a part
        own = [z * now / count for z in served]
        away = max(0.0, alone - sum(own))
        queues = [0.0] * len(own)
        for n in range(1, count + 1):
            stays = [z * (1 + q) for z, q in zip(own, queues, strict=True)]
            rate = n / (away + sum(stays))
            queues = [rate * z for z in stays]
        times = left // now if now == together else 1
        seconds += times * count / rate
        left -= times * now
    return max(seconds, max(stations))


def waits_per_product(code: Function) -> float | None:
    """Waits for Hopper's asynchronous products, per product of the loop where they are most; None
    without any. About 1 where ptxas made each product wait for the one before."""
    worst = None
    for loop in code.loops():
        inner = code.straight(loop)
        if products := sum(x.kind == "HGMMA" for x in inner):
            waits = sum(x.opcode.startswith("WARPGROUP.DEPBAR") for x in inner)
            worst = max(worst or 0.0, waits / products)
    return worst


def hot_loop(code: Function, tensor: bool) -> Loop | None:
    """The loop whose passes do most of the work: products on tensor cores, or else accesses of
    global memory."""
    amounts = {id(z): _work(code, z, tensor) for z in code.loops()}
    best = max(code.loops(), key=lambda z: amounts[id(z)], default=None)
    return best if best and amounts[id(best)] else None


def _work(code: Function, loop: Loop, tensor: bool) -> int:
    """Bytes of a lane in one pass through a loop, or FLOPs of a warp; those of fused multiply-adds
    where there are no tensor-core instructions."""
    inner = code.straight(loop)
    if not tensor:
        return sum(x.loaded + x.stored for x in inner)
    if code.has_tensor_cores:
        return sum(x.flops for x in inner)
    return sum(64 * (x.kind == "FFMA") for x in inner)


def loop_trips(launch: Launch) -> Callable[[Loop], int]:
    """How often the loops run: the hot one such that the work comes out right, those around it and
    those without work once, and others, for edges and masks, never."""
    code, tensor = launch.code, launch.flops > 0
    hot = hot_loop(code, tensor)
    if hot is None:
        return lambda loop: 1
    around = _around(code.body, hot)
    outside = sum(_work(code, z, tensor) for z in around)
    warps = launch.grid * launch.warps
    work = launch.flops / warps if tensor else launch.bytes / (32 * warps)
    count = max(1, round((work - outside) / _work(code, hot, tensor)))
    once = {id(z) for z in around}

    def trips(loop: Loop) -> int:
        if loop is hot:
            return count
        return 1 if id(loop) in once or not _work(code, loop, tensor) else 0

    return trips


def _around(loop: Loop, inner: Loop) -> list[Loop]:
    """The loops around another, the outermost first."""
    for z in loop.loops:
        if z is inner:
            return [loop]
        if inner.head in z.blocks:
            return [loop, *_around(z, inner)]
    return [loop]


def _counts(code: Function, loop: Loop, trips: Callable[[Loop], int], machine: Machine) -> Counter:
    """What a warp does in one pass through a loop: bytes of a lane, cycles of a tensor core, and
    instructions by the unit that they keep busy."""
    found = Counter()
    for x in code.straight(loop):
        found["issue"] += 1
        found["loaded"] += x.loaded
        found["tensor"] += machine.tensor_cycles(x) if x.flops else 0
        if x.kind in _XU:
            found["xu"] += 1
        elif x.kind in _SHARED:
            wide = 16 if x.kind in ("LDSM", "STSM") and x.opcode.endswith(".4") else x.width
            found["shared"] += 32 * (4 if x.kind == "SHFL" else wide)
        elif x.kind in _FMA:
            found["fma"] += 1
        elif x.kind not in _ELSEWHERE and not x.kind.startswith("U"):
            found["alu"] += 1
    for z in loop.path:
        if isinstance(z, Loop):
            times = trips(z)
            for name, count in _counts(code, z, trips, machine).items() if times else ():
                found[name] += times * count
    return found


class Warp:
    """One warp alone on a processor, in cycles."""

    # Cycles until a result is there (Jia et al. 2018; Luo et al., Benchmarking and Dissecting the
    # NVIDIA Hopper GPU Architecture, 2024), of what the control bits do not tell.
    latencies = {"LDS": 30, "LDSM": 33, "SHFL": 25, "LDC": 40, "S2R": 25, "LDL": 40}
    other = 20
    barrier = 30
    repeats = 6  # of a loop, before its other trips are taken to be as long as the last

    def __init__(self, machine: Machine, latency: float):
        self.machine, self.latency = machine, latency
        self.now = 0.0
        self.boards = [0.0] * 6
        self.units = Counter()  # unit -> when it is free
        self.copies, self.copy_groups = 0.0, []  # done at
        self.products, self.product_groups = 0.0, []
        self.loads: list[tuple[float, int]] = []  # (done at, bytes)
        self.most_in_flight = 0

    def run(self, code: Function, loop: Loop, trips: Callable[[Loop], int]) -> float:
        """The time after one pass through a loop."""
        for z in loop.path:
            if isinstance(z, int):
                for x in code.blocks[z].code:
                    self.step(x)
                continue
            times = trips(z)
            for _ in range(min(times, self.repeats)):
                start = self.now
                self.run(code, z, trips)
            if times > self.repeats:
                self.shift((times - self.repeats) * (self.now - start))
        return self.now

    def shift(self, cycles: float) -> None:
        self.now += cycles
        self.boards = [z + cycles for z in self.boards]
        self.units = Counter({unit: z + cycles for unit, z in self.units.items()})
        self.copies += cycles
        self.products += cycles
        self.copy_groups = [z + cycles for z in self.copy_groups]
        self.product_groups = [z + cycles for z in self.product_groups]
        self.loads = [(z + cycles, size) for z, size in self.loads]

    def step(self, x: Instruction) -> None:
        self.now = max(self.now, *(self.boards[i] for i in x.waits), 0)
        kind, done = x.kind, self.now + self.other
        if kind == "BAR":
            self.now += self.barrier
        elif kind == "DEPBAR":
            self._wait(self.copy_groups, x)
        elif kind == "LDGDEPBAR":
            self.copy_groups.append(self.copies)
        elif x.opcode.startswith("WARPGROUP.DEPBAR"):
            self._wait(self.product_groups, x)
        elif x.loaded:
            done = self.now + self.latency
            self.loads = [z for z in self.loads if z[0] > self.now] + [(done, x.loaded)]
            self.most_in_flight = max(self.most_in_flight, sum(size for _, size in self.loads))
            if kind == "LDGSTS":
                self.copies = max(self.copies, done)
        elif x.flops:
            done = self._busy("tensor", self.machine.tensor_cycles(x))
            self.products = max(self.products, done + self.other)
            if "gsb0" in x.operands:
                self.product_groups.append(self.products)
        elif kind in _XU:
            done = self._busy("xu", 8) + self.other
        else:
            done = self.now + self.latencies.get(kind, self.other)
        if x.sets is not None:
            self.boards[x.sets] = max(self.boards[x.sets], done)
        if x.frees is not None:
            self.boards[x.frees] = max(self.boards[x.frees], self.now + self.other)
        self.now += x.stall

    def _busy(self, unit: str, cycles: float) -> float:
        """When a unit has done this much more."""
        self.units[unit] = max(self.units[unit], self.now) + cycles
        return self.units[unit]

    def _wait(self, groups: list[float], x: Instruction) -> None:
        """Until no more of the groups are under way than the instruction says."""
        left = int(x.operands.rpartition(",")[2].strip(" ;"), 0)
        done = groups[: len(groups) - left]
        self.now = max(self.now, *done, 0)
        del groups[: len(done)]
