"""Networks spread over processes: outputs, gradients and training are those of one process.

Four processes, started once, run all checks, in pairs those of two processes; each is a test.
"""

import pytest
import torch
import torch.distributed as dist
from network_checks import (
    DROP,
    documented,
    drawn_in_parts,
    guided_in_parts,
    joint_in_parts,
    keeps_its_share,
    network_in_parts,
)
from processes import run
from sequence_checks import attention_in_16_bits, attention_in_parts, refused
from training_checks import (
    computes_in_16_bits,
    keeps_a_share_of_the_state,
    refused_by_parallelize,
    trained_in_parts,
)

from lumina import RopeScaling

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
FP64 = {"dtype": torch.float64, "backend": "torch"}
MESHES = ((2, 1), (1, 2), (4, 1), (1, 4), (2, 2))  # ring, Ulysses
ATTENTIONS = {
    "plain": {},
    "28 heads on 7": {"H": 28, "G": 7},
    "28 heads on 7, holes, text": {"H": 28, "G": 7, "mask": "holes", "L": 26, "T": 5},
    "float64": {"L": 17, "T": 3, "bias": True, **FP64},
    "one length for each": {"mask": "ragged", "T": 3, "text_mask": None},
    "a rank without keys": {"mask": "a rank without keys", "T": 3},
    "a sample without keys": {"mask": "a sample without keys", "L": 19},
    "more ranks than tokens": {"L": 3},
    "text of each token": {"T": 4, "L": 21, "text_mask": "3d", "mask": "holes"},
    "bias": {"bias": True, "L": 18, "mask": "holes"},
}
IN_16_BITS = {
    "attention in bfloat16": {"mask": "holes", "L": 26, "T": 5},
    "bfloat16, 28 heads on 7": {"H": 28, "G": 7, "L": 26},
}
SCALING = RopeScaling("time_aware", base_size=2)
LIST = ((3, 8, 6), (3, 4, 10), (3, 6, 6))  # 12, 10 and 9 tokens
NETWORKS = {
    "network": {"size": (3, 8, 8)},
    "network of 28 heads on 7": {
        "heads": dict(dim=112, n_heads=28, n_kv_heads=7),
        "size": (3, 6, 10),
    },
    "network, list": {"size": LIST, "base_seqlen": 5, "rope_scaling": SCALING},
    "network, regions, captions": {"size": (3, 6, 10), "regions": True, "captions": 2},
    "network, drop": {"size": (3, 6, 10), "context_drop": DROP, "base_seqlen": 5},
    "network, drop, list": {"size": LIST, "context_drop": DROP},
}
SIZES = tuple(size[1:] for size in LIST)
JOINT = {
    "Lumina 2": {"family": "lumina2", "sizes": ((8, 8),), "captions": 2},
    "Lumina 2, drop": {"family": "lumina2", "sizes": ((6, 10),), "context_drop": DROP},
    "Lumina 2, drop, list": {
        "family": "lumina2",
        "sizes": SIZES,
        "context_drop": DROP,
        "base_seqlen": 5,
    },
    "Z-Image, list": {"family": "z_image", "sizes": SIZES},
    "Z-Image, drop, list, captions": {
        "family": "z_image",
        "sizes": SIZES,
        "context_drop": DROP,
        "captions": 2,
    },
}
CHECKS = {
    f"{name}, ring {mesh[0]}, Ulysses {mesh[1]}": (check, mesh, changes)
    for mesh in MESHES
    for check, cases in (
        (attention_in_parts, ATTENTIONS),
        (attention_in_16_bits, IN_16_BITS),
        (network_in_parts, NETWORKS if mesh not in ((1, 2), (4, 1)) else {}),
        (drawn_in_parts, {"drawn": {}}),
        (drawn_in_parts, {"Z-Image, drawn": {"family": "z_image"}} if mesh == (2, 2) else {}),
        (joint_in_parts, JOINT if mesh not in ((1, 2), (4, 1)) else {}),
        (keeps_its_share, {"memory": {}, "memory, Lumina 2": {"family": "lumina2"}}),
    )
    for name, changes in cases.items()
}
CHECKS["refused"] = refused, (1, 4), {}
CHECKS |= {
    f"trained, {name}": (trained_in_parts, mesh, options)
    for name, mesh, options in (
        ("plain", {"data": 4}, {"steps": 3}),
        (
            "Lumina 2",
            {"data": 4},
            {"family": "lumina2", "steps": 3, "checkpoint_activations": True},
        ),
        ("Ulysses", {"data": 2, "ulysses": 2}, {"steps": 5}),
        ("ring of Ulysses", {"ring": 2, "ulysses": 2}, {"checkpoint_activations": True}),
        ("Lumina 2, shared", {"ring": 2, "ulysses": 2}, {"family": "lumina2", "steps": 3}),
        ("replicas", {"replicate": 2, "data": 2}, {"steps": 3}),
        ("replicas of shares", {"replicate": 2, "data": 1, "ring": 2}, {"steps": 3}),
        ("compiled", {"data": 2, "ring": 2}, {"compile": "eager", "steps": 2, "n_layers": 1}),
    )
}
CHECKS |= {
    f"guided, {name}": (guided_in_parts, family, options)
    for name, family, options in (
        ("Next-DiT", "next_dit", {}),
        ("Next-DiT, list", "next_dit", {"ragged": True}),
        ("Lumina 2, Euler", "lumina2", {"solver": "euler"}),
        ("Z-Image", "z_image", {}),
    )
}
CHECKS["memory of the state"] = keeps_a_share_of_the_state, (4,), {}
CHECKS["memory of the state, replicas"] = keeps_a_share_of_the_state, (2, 2), {}
CHECKS["refused by parallelize"] = refused_by_parallelize, None, {}
CHECKS["documented"] = documented, None, {}
CHECKS["bfloat16"] = computes_in_16_bits, None, {}


@pytest.fixture(scope="module")
def found():
    return run(4, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_many_processes_are_as_one(found, name):
    check, _, changes = CHECKS[name]
    for rank, errors in enumerate(found[name]):
        assert isinstance(errors, dict), f"rank {rank}: {errors}"
        for what, error in errors.items():
            if check is attention_in_16_bits:
                limit = 1.0
            elif check is computes_in_16_bits:
                limit = 2**-7  # FSDP's parameters lie elsewhere: matrices are multiplied otherwise
            elif changes.get("dtype") is torch.float64:
                limit = 1e-12
            else:
                limit = 1e-5 if what.startswith("out") else 1e-4
            assert error <= limit, f"rank {rank}, {what}: {error:.3g} > {limit}"
