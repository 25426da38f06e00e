"""The time that a warp takes alone on a processor, by the control bits of its instructions."""

from collections import Counter
from collections.abc import Callable

from lumina_kernels.machine import XU, Machine
from lumina_kernels.sass import Function, Instruction, Loop


class Warp:
    """One warp alone on a processor, in cycles."""

    # Cycles until a result is there (Jia et al. 2018; Luo et al., Benchmarking and Dissecting the
    # NVIDIA Hopper GPU Architecture, 2024), of what the control bits do not tell.
    latencies = {"LDS": 30, "LDSM": 33, "SHFL": 25, "LDC": 40, "S2R": 25, "LDL": 40}
    other = 20
    barrier = 30
    # Trips of a loop that are gone through. The others take the mean time of the last ones, whose
    # number is a multiple of 2, 3 and 4, because with so many stages some wait and others do not.
    repeats, period = 16, 12

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
            times, starts = trips(z), []
            for _ in range(min(times, self.repeats)):
                starts.append(self.now)
                self.run(code, z, trips)
            if times > self.repeats:
                of_the_last = (self.now - starts[-self.period]) / self.period
                self.shift((times - self.repeats) * of_the_last)
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
        elif kind in XU:
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
