"""Declarations for PyTorch modules that are slow to import run when somebody imports them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

PROGRAM = """
import sys
import lumina_kernels
import torch
from lumina_kernels.when_imported import when_imported

heavy = "torch.distributed.tensor", "torch.utils.flop_counter", "torch._dynamo"
assert not {*heavy} & sys.modules.keys(), "imported with lumina_kernels"
seen = []
when_imported("torch.utils.flop_counter", lambda: seen.append("before"))
when_imported("colorsys", lambda: seen.append("colorsys"))

from torch.utils.flop_counter import flop_registry

attention = torch.ops.lumina_kernels.gqa_attention_fwd
assert attention in flop_registry and seen == ["before"], seen
when_imported("torch.utils.flop_counter", lambda: seen.append("after"))
assert seen == ["before", "after"], seen

from torch.distributed.tensor import DTensor

assert attention.default in DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
print("registered")
"""


def test_rules_are_registered_when_their_module_is_imported():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "registered\n", done.stderr
