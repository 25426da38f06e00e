"""diffusers' `enable_parallelism` with our attention: outputs and gradients of one process."""

import pytest
import torch.distributed as dist
from diffusers_checks import enabled, flux, ltx, lumina2, lumina_next, refused, z_image
from processes import run

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
MESHES = ((2, 1), (1, 2), (2, 2), (1, 4))  # ring, Ulysses
CHECKS = {
    f"{make.__name__}, ring {mesh[0]}, Ulysses {mesh[1]}": (enabled, mesh, {"make": make})
    for make in (lumina_next, lumina2, z_image)
    for mesh in MESHES
}
CHECKS |= {
    "Lumina 2, one length": (enabled, (2, 2), {"make": lumina2, "ragged": False}),
    "Z-Image, one length": (enabled, (2, 2), {"make": z_image, "ragged": False}),
    "Z-Image from images": (enabled, (2, 2), {"make": z_image, "omni": True}),
    "Z-Image with controls": (enabled, (2, 2), {"make": z_image, "controlled": True}),
    "checkpointed": (enabled, (2, 1), {"make": lumina2, "checkpointed": True}),
    "28 heads on 7": (enabled, (1, 2), {"make": lumina_next, "heads": (28, 7), "size": 224}),
    "Flux": (enabled, (2, 2), {"make": flux}),
    "LTX": (enabled, (2, 2), {"make": ltx}),
    "refused": (refused, (1, 4), {}),
}


@pytest.fixture(scope="module")
def found():
    return run(4, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_shared_tokens_are_as_whole(found, name):
    for rank, errors in enumerate(found[name]):
        assert isinstance(errors, dict), f"rank {rank}: {errors}"
        for what, error in errors.items():
            limit = 1e-5 if what.startswith("out") else 1e-4
            assert error <= limit, f"rank {rank}, {what}: {error:.3g} > {limit}"
