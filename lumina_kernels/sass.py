"""A reading of machine code (SASS) as nvdisasm prints it: instructions, loops, the path that a warp
takes, and the cycles that it takes on it alone.

Every instruction says in its control bits how long the warp waits before the next one, which of six
scoreboards it holds until its result is there, and on which it waits first (Jia et al., Dissecting
the NVIDIA Volta GPU Architecture via Microbenchmarking, 2018, section 2.1). So the time of a warp
can be read off, once it is known how long a load takes.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

_LINE = re.compile(
    r"^\s*(?:(?P<label>\.L\w+):|\.text\.(?P<function>[\w$.]+):|"
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<code>[^;]+?)\s*;?\s*(?:/\* 0x[0-9a-f]{16} \*/)?\s*$|"
    r"/\* 0x(?P<control>[0-9a-f]{16}) \*/)"
)
_CODE = re.compile(r"(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*)", re.S)
_TARGET = re.compile(r"`\((\.L\w+)\)")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
# The names of tensor-core instructions tell m, n and k. HMMA is issued by one warp, Hopper's HGMMA
# by four; Blackwell's UTCHMMA has its shape in a descriptor instead.
_MMA = re.compile(r"HMMA\.(16)(8)(8|16)\.|HGMMA\.(64)x(\d+)x(\d+)\.")


@dataclass(slots=True)
class Instruction:
    opcode: str  # with its suffixes, LDG.E.128
    guard: str  # P0, !P1, or nothing
    operands: str
    stall: int = 1  # cycles until the warp's next instruction
    sets: int | None = None  # scoreboard held until the result is there
    frees: int | None = None  # scoreboard held until the operands are read
    waits: tuple[int, ...] = ()  # scoreboards waited for before

    @property
    def kind(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a lane moves if this is an access of memory."""
        return next((w for part in self.opcode.split(".") if (w := _WIDTHS.get(part))), 4)

    @property
    def loaded(self) -> int:
        """Bytes that a lane reads from global memory."""
        return self.width if self.kind in ("LDG", "LDGSTS") else 0

    @property
    def stored(self) -> int:
        return self.width if self.kind == "STG" else 0

    @property
    def target(self) -> str | None:
        """The label that it jumps to. Ampere leaves loops by calls of what comes after them."""
        found = _TARGET.search(self.operands) if self.kind in ("BRA", "CALL") else None
        return found and found[1]

    @property
    def conditional(self) -> bool:
        return bool(self.guard) and self.guard != "PT" or "P" in self.operands.partition("`")[0]

    @property
    def tile(self) -> tuple[int, ...] | None:
        """m, n and k of a tensor-core instruction."""
        found = _MMA.match(self.opcode)
        return found and tuple(int(z) for z in found.groups() if z)

    @property
    def flops(self) -> int:
        """Of a tensor-core instruction, per warp that issues it."""
        if self.tile is None:
            return 0
        return 2 * math.prod(self.tile) // (4 if self.kind == "HGMMA" else 1)


@dataclass(slots=True)
class Block:
    """Instructions without a jump in or out between them."""

    code: list[Instruction]
    next: list[int] = field(default_factory=list)


@dataclass
class Loop:
    """A natural loop: its first block, all of its blocks, and the loops right inside it."""

    head: int
    blocks: set[int]
    loops: list["Loop"] = field(default_factory=list)
    path: list["int | Loop"] = field(default_factory=list)  # that a warp takes once through


def functions(text: str) -> dict[str, "Function"]:
    """The kernels in what `nvdisasm -c -hex` prints. Without -hex there are no control bits, and
    every instruction takes one cycle."""
    found, lines = {}, []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        if match["function"]:
            lines = found[match["function"]] = []
        elif match["label"]:
            lines.append(match["label"])
        elif match["code"]:
            lines.append(instruction(match["code"]))
        elif lines and isinstance(lines[-1], Instruction):
            _control(lines[-1], int(match["control"], 16))
    return {name: Function(_blocks(lines)) for name, lines in found.items()}


def instruction(text: str) -> Instruction:
    """One line of code, without its control bits."""
    match = _CODE.match(text.strip("{} "))
    return Instruction(match["opcode"], match["guard"] or "", match["operands"])


def _control(instruction: Instruction, word: int) -> None:
    """The upper 23 bits of an instruction: reuse (4), waits (6), frees (3), sets (3), yield (1),
    stall (4); below them 41 of its own."""
    instruction.stall = max(1, word >> 41 & 15)
    sets, frees, waits = word >> 46 & 7, word >> 49 & 7, word >> 52 & 63
    instruction.sets = sets if sets < 6 else None
    instruction.frees = frees if frees < 6 else None
    instruction.waits = tuple(i for i in range(6) if waits >> i & 1)


def _blocks(lines: list) -> list[Block]:
    blocks, labels, starts = [], {}, True
    for line in lines:
        if isinstance(line, str):
            labels[line], starts = len(blocks), True
            continue
        if starts:
            blocks.append(Block([]))
        blocks[-1].code.append(line)
        starts = line.kind in ("BRA", "CALL", "EXIT", "RET", "BRX", "JMP")
    for number, block in enumerate(blocks):
        last = block.code[-1]
        ends = last.kind in ("EXIT", "RET", "BRX", "JMP") and not last.guard
        if last.target in labels and not last.opcode.startswith("BRA.DIV"):
            block.next.append(labels[last.target])
            ends = not last.conditional
        if not ends and number + 1 < len(blocks):
            block.next.append(number + 1)
    return blocks


class Function:
    """One kernel: `blocks` in the order of their addresses, and `body`, a loop that runs once."""

    def __init__(self, blocks: list[Block]):
        self.blocks = blocks

    @property
    def code(self) -> list[Instruction]:
        """All instructions, in the order of their addresses."""
        return [x for block in self.blocks for x in block.code]

    @cached_property
    def has_tensor_cores(self) -> bool:
        return any(x.flops for x in self.code)

    @cached_property
    def body(self) -> Loop:
        before = _dominators(self.blocks)
        loops = {}
        for tail, block in enumerate(self.blocks):
            for head in block.next:
                if tail in before and head in before[tail]:
                    loop = loops.setdefault(head, Loop(head, {head}))
                    loop.blocks |= _reaching(self.blocks, head, tail)
        body = self._whole = Loop(0, set(before))
        for loop in sorted(loops.values(), key=lambda loop: -len(loop.blocks)):
            outer = body
            while inside := [z for z in outer.loops if loop.head in z.blocks]:
                outer = inside[0]
            outer.loops.append(loop)
        self._find_path(body)
        return body

    def loops(self) -> list[Loop]:
        """All loops, outer before inner ones."""
        found = list(self.body.loops)
        for loop in found:
            found += loop.loops
        return found

    def _find_path(self, loop: Loop) -> tuple:
        """Set the path through the loop that most likely is the fast one, and return its value.

        Of two ways it is the one with more accesses of 16 bytes and tensor-core instructions; then
        the one that moves fewer bytes, since where a dtype is known at run time there is a way for
        float32 too; then the shorter one, without options, rare cases, and what a part of the
        threads does for the others."""
        inner = {number: z for z in loop.loops for number in z.blocks}
        values = {id(z): self._find_path(z) for z in loop.loops}
        best: dict[int, tuple] = {}  # block -> (value of the path from it on, path)

        def after(number: int) -> tuple | None:
            if number in best:
                return best[number]
            best[number] = None  # a cycle that is no natural loop ends here
            node = inner.get(number, number)
            own = values[id(node)] if isinstance(node, Loop) else self._value(number)
            blocks = node.blocks if isinstance(node, Loop) else {number}
            following = {z for x in blocks for z in self.blocks[x].next}
            is_end = loop.head in following - (blocks if isinstance(node, Loop) else set())
            is_end |= loop is self._whole and any(not self.blocks[x].next for x in blocks)
            found = [after(z) for z in sorted(following & loop.blocks - blocks - {loop.head})]
            found = [z for z in found if z is not None]
            if is_end:
                found.append(((0,) * len(own), ()))
            if found:
                value, path = max(found, key=lambda z: z[0])
                value = tuple(a + b for a, b in zip(own, value, strict=True))
                best[number] = value, (node, *path)
            return best[number]

        value, path = after(loop.head) or (self._value(loop.head), (loop.head,))
        loop.path = list(path)
        return value

    def _value(self, number: int) -> tuple[int, ...]:
        code = self.blocks[number].code
        moved = [x.loaded + x.stored for x in code]
        wide = any(size >= 16 for size in moved) or any(x.flops or "UTC" in x.opcode for x in code)
        return int(wide), -sum(moved), -len(code)

    def trace(self, trips: Callable[[Loop], int], loop: Loop | None = None) -> Iterator:
        """The instructions of a warp, every loop as often as `trips` says."""
        loop = loop or self.body
        for node in loop.path:
            if isinstance(node, Loop):
                for _ in range(trips(node)):
                    yield from self.trace(trips, node)
            else:
                yield from self.blocks[node].code

    def straight(self, loop: Loop) -> list[Instruction]:
        """The instructions of one pass through a loop, without those of loops inside."""
        return [x for n in loop.path if isinstance(n, int) for x in self.blocks[n].code]


def _dominators(blocks: list[Block]) -> dict[int, set[int]]:
    """Block -> blocks that every way to it leads through, of those that can be reached."""
    order, seen = [], set()

    def visit(first):
        stack = [(first, iter(blocks[first].next))]
        seen.add(first)
        while stack:
            number, following = stack[-1]
            new = next((z for z in following if z not in seen), None)
            if new is None:
                order.append(number)
                stack.pop()
            else:
                seen.add(new)
                stack.append((new, iter(blocks[new].next)))

    visit(0)
    order.reverse()
    before = {number: [] for number in order}
    for number in order:
        for z in blocks[number].next:
            before[z].append(number)
    found = {number: set(order) for number in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for number in order[1:]:
            new = set.intersection(*(found[z] for z in before[number])) | {number}
            changed |= new != found[number]
            found[number] = new
    return found


def _reaching(blocks: list[Block], head: int, tail: int) -> set[int]:
    """Blocks from which `tail` is reached without going through `head`."""
    before: dict[int, list[int]] = {}
    for number, block in enumerate(blocks):
        for z in block.next:
            before.setdefault(z, []).append(number)
    found, stack = {head}, [tail]
    while stack:
        number = stack.pop()
        if number not in found:
            found.add(number)
            stack += before.get(number, [])
    return found
