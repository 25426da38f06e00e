"""What the host makes of small kernels for Hopper that keep or break a rule."""

import pytest
from cuda_host import rules

KEPT = (
    "ring", "ring, 64 bytes", "ring, 32 bytes", "ring, no swizzle", "values of 128",
    "values of 64", "values of 64 in two", "values of 32", "values of 32 in two",
    "values of 64 in pieces", "values of 8", "copy at the edge", "hand over",
)  # fmt: skip
UNSEEN_COPY = r"shared memory \(byte \d+\) that TMA fills, without a wait for its mbarrier"
BROKEN = {
    "no arrival": r"waits at an mbarrier .* lacks 4 arrivals and 0 bytes",
    "two arrivals": "copies to shared memory .* that a wgmma may still read|lacks 1 arrivals",
    "too many arrivals": "arrives at an mbarrier more often than its phase expects",
    "no mbarrier": "uses an mbarrier that nobody initialised",
    "wrong parity": UNSEEN_COPY + "|that nothing wrote",
    "wrong parity of the producer": r"waits at an mbarrier .* lacks 4 arrivals and 0 bytes",
    "too many bytes expected": r"waits at an mbarrier .* lacks 0 arrivals and 16 bytes",
    "too few bytes expected": "an mbarrier got 16 bytes more than its phase expects",
    "no wait for a copy": UNSEEN_COPY + "|that nothing wrote",
    "copy over what is read": "copies to shared memory .* that a wgmma may still read|more often",
    "no fence after init": "copies for an mbarrier that no fence.proxy.async followed",
    "no barrier after init": "with no barrier after its initialisation|that nobody initialised",
    "no fence after writes": "a wgmma reads .* a thread wrote without fence.proxy.async",
    "no barrier after writes": r"reads shared memory that (nothing wrote|.* with no barrier)",
    "no wgmma fence": "starts a product without wgmma.fence",
    "no commit": "copies to shared memory .* that a wgmma may still read|product is under way",
    "no wgmma wait": "copies to .* that a wgmma may still read|without wgmma.fence|under way",
    "sums touched": "changes the sums of a product in flight",
    "factors touched": "changes the factors of a product in flight",
    "matrix overwritten": "writes shared memory .* that a wgmma may still read",
    "product of some warps": "a product that some warps of its group did not start",
    "another matrix in a warp": "starts another product than the other warps of its group",
    "misplaced tile": "a tensor copy of rows of 128 bytes to byte 16512 is not what TMA takes",
    "misplaced matrix": "the matrix of a wgmma does not begin where its swizzle does",
    "rows longer than the swizzle": "a tensor copy of rows of 128 bytes .* is not what TMA takes",
    "hand over to nobody": "ends while barrier 2 lacks threads",
    "hand over with another count": "barrier 2 is of (128|256) threads here",
    "hand over to some": r"wrote with no barrier between|ends while barrier 2 lacks threads",
}  # fmt: skip


@pytest.mark.parametrize("rule", KEPT)
def test_what_keeps_the_rules_runs(rule):
    rules.run("rules_hopper.cu", rule)


@pytest.mark.parametrize("rule", BROKEN)
def test_what_breaks_a_rule_is_reported(rule):
    with pytest.raises(RuntimeError, match=BROKEN[rule]):
        rules.run("rules_hopper.cu", rule)
