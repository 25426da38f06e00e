"""What the host makes of small kernels that keep or break a rule."""

import pytest
from cuda_host import rules

KEPT = (
    "barrier", "barrier of a warp", "write after read", "shuffles", "copy", "copy with zeros",
    "m16n8k16", "m16n8k8", "rounding",
)  # fmt: skip
BROKEN = {
    "no barrier": r"reads shared memory that (nothing wrote|.* wrote with no barrier between)",
    "barrier of some": r"a barrier \(rules.cu:\d+\) that some .* \(7, 0, 0\) has returned",
    "barriers at two lines": r"is at the barrier rules.cu:\d+ while others are at rules.cu:\d+",
    "shuffle of some": r"a warp collective .* that some .* \(40, 0, 0\) has returned",
    "shuffle from outside": "a shuffle reads lane 31, which is not in its mask",
    "no barrier of a warp": r"shared memory that (nothing wrote|.* wrote with no barrier between)",
    "write after read, no barrier": r"shared memory that .* (read|wrote) with no barrier between",
    "never written": "reads shared memory that nothing wrote",
    "beyond shared": "writes 4 bytes at byte 256 of a shared array of 256",
    "misaligned shared": "writes 16 bytes of shared memory misaligned",
    "beyond global": "writes 4 bytes at byte 256 of a tensor of 256",
    "before global": "reads 4 bytes at byte -4 of a tensor of 256",
    "misaligned global": "reads 16 bytes of global memory misaligned",
    "copy without a wait": "reads shared memory that a cp.async has not filled yet",
    "copy without a barrier": "shared memory",
    "too many threads": "a block of 1025 threads",
}


@pytest.mark.parametrize("rule", KEPT)
def test_what_keeps_the_rules_runs(rule):
    rules.run("rules.cu", rule)


@pytest.mark.parametrize("rule", BROKEN)
def test_what_breaks_a_rule_is_reported(rule):
    with pytest.raises(RuntimeError, match=BROKEN[rule]):
        rules.run("rules.cu", rule)
