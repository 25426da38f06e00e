"""The machine code of the kernels, compiled for GPUs that need not be here."""

import json
import re

import pytest
from common import run_compiling

from lumina_kernels import aot, sass

# Kernels that only add up partial sums or fill small outputs do not move 16 bytes per lane.
SECOND_STAGES = {
    "modulation_grads_kernel",
    "sandwich_norm_gate_kernel",
    "qk_norm_rope3d_parameters_kernel",
}
# The backward of the example that a model calls an op with; of attention, that of three, as a plain
# one is a part of that with text. The last are kernels whose products have waited for each other,
# which neither a bias of pairs nor another head_dim tells of a bias or a mask.
TASKS = [
    ("gqa_attention", 90, 72, "bf16", None, ["text", "regions", "bias of pairs"], None),
    *(
        (op, 90, 72, "bf16", None, None, None)
        for op in aot.OPS
        if op not in ("gqa_attention", "swiglu")
    ),
    *(
        ("gqa_attention", 90, head_dim, "bf16", [name], [name], [kernel])
        for head_dim, name, kernel in (
            (72, "bias", "dq"), (128, "bias", "dq"), (96, "bias of pairs", "dkv"),
            (96, "regions", "dkv"), (128, "regions", "dkv"),
        )
    ),
    *(
        ("gqa_attention", *variant, names, names, None)
        for *variant, names in (
            (80, 72, "bf16", ["text"]), (120, 72, "bf16", ["text"]),
            (90, 96, "bf16", ["text", "bias"]), (90, 96, "fp32", ["text"]),
            (100, 72, "fp16", ["bias of pairs"]), (90, 128, "bf16", ["text", "bias of pairs"]),
        )
    ),
]  # fmt: skip
# One process that forks: to import what they need takes as long as two kernels.
INSPECT = """
import json, multiprocessing, os, sys
from lumina_kernels import aot
from lumina_kernels.triton import gqa_attention

tasks, path = json.loads(sys.argv[1]), sys.argv[2]
examples, steps, launch = aot.examples, aot._steps, gqa_attention._launch

def rows(task):
    op, arch, head_dim, dtype, names, gradients, kernels = task
    order = []

    def chosen(*given):
        found = examples(*given)
        order.extend(names or found)
        return {name: found[name] for name in order}

    def wanted(op, arguments):
        name = order.pop(0)
        if name in (gradients or [FIRST[op]]):
            left_out = ["fwd"] if names else []  # the one that keeps more is compiled
        else:
            left_out = ["bwd"] if op == "gqa_attention" else ["fwd training", "bwd"]
        return {k: step for k, step in steps(op, arguments).items() if k not in left_out}

    def some(kernel, *given, **constants):
        if kernels is None or kernel in kernels:
            launch(kernel, *given, **constants)

    aot.examples, aot._steps, gqa_attention._launch = chosen, wanted, some
    return aot.inspect(op, arch, head_dim, dtype)

FIRST = {op: next(iter(examples(op, aot.Sizes()))) for op in aot.OPS}
with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
    found = pool.map(rows, tasks, chunksize=1)
open(path, "w").write(json.dumps(sum(found, [])))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Figures of a part of all variants, from processes without the interpreter."""
    folder, found = tmp_path_factory.mktemp("aot"), []
    swiglu = "--op swiglu --arch 90 --head-dim 72 --dtype bf16 --json".split()
    commands = {
        folder / "swiglu.json": ("-m", "lumina_kernels.aot", *swiglu),
        folder / "others.json": ("-c", INSPECT, json.dumps(TASKS)),
    }
    for path, command in commands.items():
        done = run_compiling(*command, str(path))
        assert done.returncode == 0, done.stdout + done.stderr
        found += json.loads(path.read_text())
    return found


def test_every_op_has_kernels(rows):
    assert {row["op"] for row in rows} == set(aot.OPS)
    assert all("error" not in row for row in rows)
    without_gradient = {"guided_step"}
    for op in set(aot.OPS) - without_gradient:
        assert any("bwd" in row["call"] for row in rows if row["op"] == op), op


def test_nothing_is_spilled(rows):
    """But by attention's tiles for Hopper, which were measured as the fastest, some with a few
    spills: more of them is a change of the compiler or of the kernels, to be measured again."""
    for row in rows:
        is_measured = row["op"] == "gqa_attention" and row["arch"] == 90 and row["dtype"] != "fp32"
        assert row["stack"] <= (400 if is_measured else 0), row


def test_attention_is_on_tensor_cores_with_little_padding(rows):
    attention = [row for row in rows if row["op"] == "gqa_attention"]
    assert {row["arch"] for row in attention} == set(aot.ARCHS)
    for row in attention:
        kinds = "".join(row["mma"])
        if row["dtype"] == "fp32":
            assert kinds == "", row  # tf32 would drop 13 bits of the products
        elif row["arch"] == 90:
            assert "HGMMA" in kinds and "HMMA 16" not in kinds, row
        else:
            assert kinds, row
        if row["dtype"] != "fp32":
            assert row["useful"] >= {72: 0.88, 96: 0.99, 128: 0.99}[row["head_dim"]], row


def test_products_do_not_wait_for_each_other(rows):
    """Hopper's are asynchronous, unless ptxas finds a reason to wait after each of them: then there
    is a wait to a product, instead of one to ten."""
    found = set()
    for row in rows:
        if row["op"] == "gqa_attention" and row["arch"] == 90 and row["dtype"] == "bf16":
            found.add((row["head_dim"], row["call"], row["kernel"]))
            assert row["waits"] <= 0.5, row
    alone = {
        (head_dim, f"{name} bwd", f"gqa_attention_{kernel}_kernel")
        for _, _, head_dim, _, names, _, kernels in TASKS
        for name, kernel in zip(names or (), kernels or (), strict=False)
    }
    assert len(alone) == 5 and alone <= found and len(found) > 30
    assert {kernel[14:-7] for _, _, kernel in found} == {"fwd", "dq", "dkv"}


def test_times_are_predicted(rows):
    for row in rows:
        gpus = {80: {"A100"}, 90: {"H100", "H200"}, 120: {"RTX PRO 6000"}}.get(row["arch"], set())
        assert set(row["predicted"]) == gpus, row
        for found in row["predicted"].values():
            assert found["us"] > 3.8 and 0 < found["share"] < 1.1, row


def test_masks_and_text_cost_attention_little(rows):
    """Of 256 tokens, with 64 of text. Triton may compute the weights again for each layout that
    they are wanted in, which takes twice as long and shows nowhere else."""
    times = {}
    for row in rows:
        is_next = row["arch"] == 90 and row["head_dim"] == 72
        if is_next and row["kernel"] == "gqa_attention_fwd_kernel":
            times[row["call"]] = row["predicted"]["H100"]["us"]
    assert len(times) == 12, times
    for call, us in times.items():
        assert us <= 1.4 * times["plain " + call[call.index("fwd") :]], (call, us)


def test_memory_moves_16_bytes_at_a_time(rows):
    """Shares of the bytes in the code. What is left is positions, frequencies and statistics, and
    where four warps share a row of 2304 = 2048 + 256 values, the 256."""
    elementwise = {"gelu", "guided_step", "swiglu"}
    norms = {"norm_modulate", "sandwich_norm", "sandwich_norm_chain", "gate_residual_norm"}
    for row in rows:
        if row["op"] == "gqa_attention" or row["kernel"] in SECOND_STAGES:
            continue
        if "complex" in row["call"]:  # every second number of a table, and heads cut at 24 and 48
            least = 0.2 if row["op"] == "rope_table" else 0
            assert row["loads"] >= least and row["stores"] > 0.4, row
        elif "half" in row["call"]:  # the second half of a head starts at 72 bytes
            assert row["loads"] > 0.45 and row["stores"] > 0.4, row
        elif row["op"] in elementwise:
            numbers = row["call"] == "tensors fwd"  # reads two more
            assert row["stores"] == 1 and row["loads"] >= (0.85 if numbers else 1), row
        elif "bwd" in row["call"]:
            # The backward of k has rows of 576 on one warp, and reads its tables for every token. A
            # weight that heads share has its sums over the heads stored once a program, in pieces.
            least = 0.49 if row["op"].startswith("qk_norm") else 0.59
            stores = 0.65 if "rms_per_head" in row["call"] else 0.88
            assert row["loads"] > least and row["stores"] > stores, row
        elif row["op"] in norms:
            assert row["loads"] > 0.94 and row["stores"] > 0.94, row
        else:
            # Frequencies, for every sample, or those of a token that two warps share.
            least = 0.77 if row["op"] == "qk_norm_rope3d" else 0.78
            least = 0.75 if "per sample" in row["call"] else least
            assert row["loads"] > least and row["stores"] > 0.82, row


def test_a_kernel_that_does_not_compile_is_reported_and_the_interpreter_refused(
    monkeypatch, capsys
):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="interpreter compiles nothing"), aot.offline(90):
        pass
    row = aot._inspect(("swiglu", 90, 72, "bf16"))
    assert len(row) == 1 and "interpreter compiles nothing" in row[0]["error"]
    assert "FAILED RuntimeError" in aot._line(row[0])


def test_a_kernel_that_the_gpu_has_no_shared_memory_for_is_reported():
    """Each GPU has its own limit. A small one here, so that the kernel compiles fast."""
    script = """
from lumina_kernels import aot
from lumina_kernels.examples import _sizes, gqa_attention
found = gqa_attention.examples
aot.examples = lambda op, sizes: {"plain": found(sizes)["plain"]}
aot._steps = lambda op, arguments, steps=aot._steps: {"fwd": steps(op, arguments)["fwd"]}
aot.SHARED_KIB[80] = 8
for row in aot.inspect("gqa_attention", 80, 24, "fp16"):
    print(row["call"], row["error"])
"""
    done = run_compiling("-c", script)
    assert done.returncode == 0, done.stderr
    message = (
        r"plain fwd backend 'triton' has no tiles of gqa_attention for a head_dim of 24 in "
        r"torch.float16 on sm_80: shared memory (\d+) of 8192\n"
    )
    assert int(re.fullmatch(message, done.stdout)[1]) > 8192


def test_backwards_of_wide_rows_fit_small_gpus():
    """Their loops have the next row come into shared memory where there is room for it."""
    script = """
import torch
import lumina_kernels as lk
from lumina_kernels import aot

def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float32, requires_grad=True)

for D in (1024, 4096):
    rows, sample, width = (zeros(1, 9, D), zeros(1, 9, D)), zeros(1, D), zeros(D)
    with aot.offline(89) as (compiled, launches):
        parameters = sample, width, width, sample, sample
        results = lk.gate_residual_norm(*rows, *parameters, 1e-6, "layer", backend="triton")
        sum(x.sum() for x in results).backward()
        found = [row for row in aot.figures(compiled, launches, 89) if "norm_bwd" in row["kernel"]]
    print(*[row["shared"] // (4 * D) for row in found])
"""
    done = run_compiling("-c", script)
    assert done.stdout == "7\n0\n", done.stdout + done.stderr


def test_the_limits_of_shared_memory_are_those_of_the_gpus():
    found = {
        arch: aot.OfflineDriver(arch).utils.get_device_properties(arch)["max_shared_mem"]
        for arch in aot.SHARED_KIB
    }
    kib = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
    assert found == {arch: 1024 * size for arch, size in kib.items()}


def test_widths_of_accesses_are_read_from_the_code():
    def code(*lines):
        return [sass.instruction(line) for line in lines]

    accesses = code(
        "LDG.E.128 R1", "LDG.E.64 R2", "LDG.E.U16 R3", "LDG.E R4", "STG.E.128 [R1]",
        "LDGSTS.E.BYPASS.128 [R1]",
    )  # fmt: skip
    assert aot._wide_share(accesses, ("LDG",)) == 16 / 30
    assert aot._wide_share(accesses, ("LDG", "LDGSTS")) == 32 / 46
    assert aot._wide_share(accesses, ("STG",)) == 1
    assert aot._wide_share(code("EXIT"), ("STG",)) is None
    hopper = code("HGMMA.64x80x16.F32.BF16 R1", "HGMMA.64x16x16.F32 R2")
    assert aot._tensor_cores(hopper, 8) == (
        {"HGMMA 64x80x16": 1, "HGMMA 64x16x16": 1},
        2 * 64 * 96 * 16 * 2,
    )
    assert aot._tensor_cores(code("HMMA.16816.F32.BF16 R1"), 4) == ({"HMMA 16x8x16": 1}, 4 * 4096)
