"""Machine code is read as blocks, loops, and the path that a warp takes."""

from lumina_kernels import sass


def function(*lines):
    """A kernel of these lines, with labels ("L1:") and jumps ("BRA L1")."""
    text = ["\t.section .text.k", ".text.k:"]
    for number, line in enumerate(lines):
        for label in ("L1", "L2", "L3", "L4"):
            line = line.replace(f"BRA {label}", f"BRA `(.{label})")
        text.append(f".{line}" if line.endswith(":") else f"        /*{number:04x}*/  {line} ;")
    return sass.functions("\n".join(text))["k"]


def opcodes(code):
    return [x.opcode for x in code]


def test_an_instruction_and_its_control_bits():
    text = """
.text.first:
        /*0540*/              @!P0 LDG.E.128 R76, desc[UR4][R16.64] ;  /* 0x000000041b4c8981 */
                                                                     /* 0x0041620000000d00 */
        /*0550*/                   EXIT ;                              /* 0x000000000000794d */
                                                                     /* 0x000fea0003800000 */
.text.second:
        /*0000*/                   NOP;
"""
    found = sass.functions(text)
    assert list(found) == ["first", "second"]
    load, end = found["first"].code
    assert (load.opcode, load.guard, load.kind) == ("LDG.E.128", "!P0", "LDG")
    assert load.operands == "R76, desc[UR4][R16.64]"
    # 0x0041620000000d00 >> 41 is 0b000_000100_000_101_1_0001: it waits for scoreboard 2, holds
    # number 5 until it has loaded and number 0 until its address is read, and takes a cycle.
    assert (load.stall, load.sets, load.frees, load.waits) == (1, 5, 0, (2,))
    assert (end.stall, end.sets, end.frees, end.waits) == (5, None, None, ())
    assert (load.loaded, load.stored) == (16, 0)


def test_sizes_of_accesses_and_products():
    widths = {
        "LDG.E R1": 4, "LDG.E.U16 R1": 2, "LDG.E.S8 R1": 1, "LDG.E.64 R1": 8,
        "LDG.E.LTC128B.128 R1": 16, "LDG.E.ENL2.256 R1": 32, "LDGSTS.E.BYPASS.128 [R1]": 16,
    }  # fmt: skip
    for text, width in widths.items():
        assert sass.instruction(text).loaded == width
    store = sass.instruction("@P1 STG.E.64 desc[UR4][R2.64], R4")
    assert (store.stored, store.loaded, store.guard) == (8, 0, "P1")
    assert sass.instruction("STS.128 [R1], R4").stored == 0  # it is to shared memory
    assert sass.instruction("HMMA.16816.F32.BF16 R4, R8, R2, R4").flops == 2 * 16 * 8 * 16
    hopper = sass.instruction("HGMMA.64x80x16.F32.BF16 R24, gdesc[UR8], R24, gsb0")
    assert hopper.tile == (64, 80, 16) and hopper.flops == 2 * 64 * 80 * 16 // 4
    assert sass.instruction("FFMA R1, R2, R3, R4").flops == 0


def test_loops_within_loops():
    kernel = function(
        "MOV R1, R2", "L1:", "LDG.E R3", "L2:", "FADD R1, R1, R3", "@P0 BRA L2",
        "STG.E [R1], R3", "@P1 BRA L1", "EXIT",
    )  # fmt: skip
    outer, inner = kernel.loops()
    assert kernel.body.loops == [outer] and outer.loops == [inner] and inner.loops == []
    assert opcodes(kernel.straight(kernel.body)) == ["MOV", "EXIT"]
    assert opcodes(kernel.straight(outer)) == ["LDG.E", "STG.E", "BRA"]
    assert opcodes(kernel.straight(inner)) == ["FADD", "BRA"]
    times = {id(outer): 2, id(inner): 3}
    whole = opcodes(kernel.trace(lambda loop: times[id(loop)]))
    assert whole.count("FADD") == 6 and whole.count("LDG.E") == 2 and len(whole) == 2 + 6 + 12


def test_a_jump_back_from_rare_code_is_no_loop():
    """Compilers put rare cases behind the end. They jump back to where they left."""
    kernel = function(
        "MOV R1, R2", "@P0 BRA L1", "L2:", "STG.E [R2], R1", "EXIT",
        "L1:", "FADD R1, R1, R1", "BRA L2", "L3:", "BRA L3",
    )  # fmt: skip
    assert kernel.loops() == []
    assert opcodes(kernel.trace(lambda loop: 1)) == ["MOV", "BRA", "STG.E", "EXIT"]


def test_the_path_is_the_wide_one_in_16_bits():
    kernel = function(
        "@P0 BRA L1", "LDG.E.U16 R1", "LDG.E.U16 R2", "BRA L2",  # columns that are not aligned
        "L1:", "@P1 BRA L3", "LDG.E.128 R4", "LDG.E.128 R8", "BRA L2",  # float32
        "L3:", "LDG.E.128 R4", "PRMT R8, R4", "PRMT R9, R5", "PRMT R10, R5",
        "L2:", "@P2 BRA L4", "MUFU.SIN R1, R1", "STS [R1], R1",  # an option
        "L4:", "STG.E.128 [R4], R8", "@P3 EXIT", "FADD R1, R1, R1", "EXIT",
    )  # fmt: skip
    path = opcodes(kernel.trace(lambda loop: 1))
    assert [x for x in path if x.startswith("LDG")] == ["LDG.E.128"]
    assert path.count("PRMT") == 3 and "STS" not in path and path[-1] == "EXIT"


def test_a_slow_way_of_a_divergent_warp_is_never_taken():
    kernel = function("BRA.DIV UR4, `(.L1)", "STG.E.128 [R4], R8", "EXIT", "L1:", "NOP", "EXIT")
    assert opcodes(kernel.trace(lambda loop: 1)) == ["BRA.DIV", "STG.E.128", "EXIT"]


def test_ampere_leaves_a_loop_by_a_call():
    kernel = function(
        "MOV R1, R2", "L1:", "HMMA.16816.F32 R4, R8, R2, R4", "@P0 CALL.REL.NOINC `(.L2)",
        "BRA L1", "L2:", "CALL.REL.NOINC `($division)", "STG.E.128 [R4], R8", "EXIT",
    )  # fmt: skip
    (loop,) = kernel.loops()
    assert opcodes(kernel.straight(loop)) == ["HMMA.16816.F32", "CALL.REL.NOINC", "BRA"]
    whole = opcodes(kernel.trace(lambda loop: 5))
    assert whole.count("HMMA.16816.F32") == 5 and whole[-2:] == ["STG.E.128", "EXIT"]
