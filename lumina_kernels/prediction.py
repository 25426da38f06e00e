"""The time that a kernel should take on a GPU, by what is counted in its machine code: a roofline
of few terms, whose warps queue for what they share. Nothing is timed.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from lumina_kernels.machine import (
    BLOCKS,
    MACHINES,
    PARTS,
    REGISTERS,
    SHARED_OF_A_BLOCK,
    XU,
    Machine,
)
from lumina_kernels.sass import Function, Loop
from lumina_kernels.warp import Warp

# Instructions by the unit that they keep busy; those that are nowhere here are for the ALU.
_FMA = {"FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2", "IMAD", "HFMA2", "HADD2", "HMUL2"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMS"}
_ELSEWHERE = XU | _FMA | _SHARED | {
    "LDG", "STG", "LDGSTS", "LDC", "ULDC", "LDGDEPBAR", "DEPBAR", "BAR", "BRA", "EXIT", "NOP",
    "HMMA", "HGMMA", "WARPGROUP", "BSSY", "BSYNC", "S2R", "S2UR", "MEMBAR", "FENCE", "R2UR", "CS2R",
    "LDL", "STL", "SYNCS",
}  # fmt: skip


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


def predicted(launch: Launch, arch: int, useful: float = 1.0) -> dict:
    """What the model says of a launch on the GPUs of an architecture; nothing where tensor cores
    are told sizes that the machine code does not show (Blackwell's tcgen05)."""
    if any(x.kind.startswith("UTC") for x in launch.code.code):
        return {"predicted": {}}
    figures, times = {}, {}
    for gpu in MACHINES.values():
        if gpu.arch != arch:
            continue
        found = predict(launch, gpu)
        rate = launch.bytes / found.seconds / gpu.copy_rate
        if launch.flops:
            rate = launch.flops * useful / found.seconds / gpu.tensor_rate
        times[gpu.name] = {"us": found.seconds * 1e6, "share": rate, "limit": found.limit}
        names = ("resident", "waves", "in_flight", "per_copy", "waits", "barriers")
        figures = {name: getattr(found, name) for name in names}
    return {**figures, "predicted": times}


def resident_blocks(launch: Launch, machine: Machine) -> int:
    """Blocks that a processor holds by registers, shared memory, warps."""
    of_a_warp = -(-launch.registers * 32 // 256) * 256
    warps = REGISTERS // PARTS // of_a_warp * PARTS
    by_registers = warps // launch.warps
    by_shared = (machine.shared_kib << 10) // (launch.shared + SHARED_OF_A_BLOCK)
    return max(1, min(BLOCKS, machine.warps // launch.warps, by_registers, by_shared))


def predict(launch: Launch, machine: Machine) -> Prediction:
    """The time of a launch by `_queued`, its terms, each on its own, and the largest of them.

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
    global memory. Of two loops with the same the inner one: what comes before and after it, for
    its first and its last pass, may be as much as a pass."""
    amounts = {id(z): _work(code, z, tensor) for z in code.loops()}
    best = max(code.loops(), key=lambda z: amounts[id(z)], default=None)
    while best and (same := [z for z in best.loops if amounts[id(z)] == amounts[id(best)]]):
        best = same[0]
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
        if x.kind in XU:
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
