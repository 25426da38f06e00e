"""diffusers' models before `enable_parallelism` and after it, on the same weights and inputs."""

import functools

import diffusers
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers import transformer_z_image
from processes import error, mean, refuses
from torch import randn
from torch.distributed.device_mesh import init_device_mesh

from lumina.distributed.diffusers import register


@functools.cache
def mesh_of(ring, ulysses):
    shape = dist.get_world_size() // (ring * ulysses), ring, ulysses
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "ring", "ulysses"))


def config(mesh):
    """For all ranks diffusers makes the mesh itself."""
    degrees = {"ring_degree": mesh[0], "ulysses_degree": mesh[1]}
    every = mesh[0] * mesh[1] == dist.get_world_size()
    return ContextParallelConfig(**degrees, mesh=None if every else mesh_of(*mesh))


def captions(ragged):
    """Two of 7 tokens, or one of 7 and one of 4, and their mask."""
    lengths = torch.tensor([[7], [4 if ragged else 7]])
    return randn(2, 7, 16), torch.arange(7) < lengths


def lumina_next(heads=(4, 1), size=32):
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=16, hidden_size=size, num_layers=2, num_attention_heads=heads[0],
        num_kv_heads=heads[1], multiple_of=16, cross_attention_dim=16,
    )  # fmt: skip
    text, mask = captions(ragged=True)
    return model, {
        "hidden_states": randn(2, 4, 10, 6),  # 15 tokens
        "timestep": torch.rand(2),
        "encoder_hidden_states": text,
        "encoder_mask": mask,
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(size // heads[0], 384, 384),
        "cross_attention_kwargs": {"base_sequence_length": 5},
    }


def lumina2(ragged=True):
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
        num_attention_heads=4, num_kv_heads=2, multiple_of=16, cap_feat_dim=16,
        axes_dim_rope=(4, 2, 2),
    )  # fmt: skip
    text, mask = captions(ragged)
    return model, {
        "hidden_states": randn(2, 4, 10, 6),
        "timestep": torch.rand(2),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
    }


def z_image(ragged=True, omni=False, controlled=False):
    transformer_z_image.SEQ_MULTI_OF = 5  # in place of 32, which two and four ranks always divide
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4,
        cap_feat_dim=16, axes_dims=(4, 2, 2), siglip_feat_dim=16 if omni else None,
    )  # fmt: skip
    inputs = {
        "x": [randn(4, 1, 10, 6), randn(4, 1, 6, 6) if ragged else randn(4, 1, 10, 6)],
        "t": torch.rand(2),
        "cap_feats": [randn(7, 16), randn(3 if ragged else 7, 16)],
    }
    if omni:
        inputs |= {
            "x": [[randn(4, 1, 4, 4), x] for x in inputs["x"]],
            "cap_feats": [[x, randn(3, 16)] for x in inputs["cap_feats"]],
            "siglip_feats": [[randn(2, 2, 16), None] for _ in range(2)],
            "image_noise_mask": [[0, 1]] * 2,
        }
    if controlled:  # 15 and 10 tokens of images, 10 and 5 of captions
        inputs["controlnet_block_samples"] = {0: randn(2, 25, 32)}
    return model, inputs


def flux():
    """Two layers with a plan of diffusers' own, which asks for lengths that divide."""
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 16, 4),
        "encoder_hidden_states": randn(2, 8, 16),
        "pooled_projections": randn(2, 16),
        "timestep": torch.rand(2),
        "img_ids": torch.arange(48.0).view(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }


def ltx():
    """Attention to a text whose tokens are spread too, by a mask with an axis of heads."""
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=2, caption_channels=16,
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 16, 4),
        "encoder_hidden_states": randn(2, 8, 16),
        "timestep": torch.tensor([500, 300]),
        "encoder_attention_mask": torch.arange(8) < torch.tensor([[8], [3]]),
        "num_frames": 1,
        "height": 4,
        "width": 4,
    }


def enabled(mesh, make, checkpointed=False, **options):
    """The output, and the mean over the ranks of all gradients, as on one process."""
    register()
    model, inputs = make(**options)
    with torch.no_grad():
        for x in model.parameters():  # some begin as zeros, and some with whatever was there
            x.copy_(torch.ones_like(x) if x.ndim == 1 else x).add_(0.1 * randn(x.shape))
    if checkpointed:
        model.enable_gradient_checkpointing()
    has_plan = make in (flux, ltx)
    single = results(model, inputs)
    if has_plan:
        model.set_attention_backend("lumina")
        again = results(model, inputs)
    torch.accelerator.device_count = lambda: int(has_plan)  # diffusers divides by it
    model.enable_parallelism(config=config(mesh))
    out, grads = results(model, inputs)
    found = {"out": error(out, single[0])}
    if has_plan:  # its own hooks have another convention for gradients
        return found | {"out, alone": error(again[0], single[0])}
    largest = max(x.abs().max().item() for x in single[1].values())
    for name, grad in mean(grads).items():
        found[f"d {name}"] = error(grad, single[1][name], 1e-3 * largest)
    return found


def results(model, inputs):
    model.zero_grad()
    out = model(**inputs, return_dict=False)[0]
    out = torch.cat([x.flatten() for x in out]) if isinstance(out, list) else out
    (out * out.detach().sin()).sum().backward()
    return out.detach(), {n: x.grad for n, x in model.named_parameters() if x.grad is not None}


def refused(mesh):
    """What would draw another picture, said before or in the call."""
    register()
    found = {}

    def check(name, kind, text, make, change, call="enable_parallelism", **options):
        model, inputs = make(**options)
        change(model)
        if call == "forward":
            model.enable_parallelism(config=config(mesh))
            found[name] = refuses(kind, text, model, **inputs)
        else:
            found[name] = refuses(kind, text, model.enable_parallelism, config=config(mesh))

    def keep(model):
        return None

    def own_processor(model):
        class Other(type(model.layers[0].attn1.processor)):
            pass

        model.layers[0].attn1.processor = Other()

    check("processor", ValueError, "diffusers' own processor", lumina_next, own_processor)
    check(
        "backend", ValueError, 'must be "lumina"', z_image,
        lambda model: model.set_attention_backend("native"),
    )  # fmt: skip
    check("heads", ValueError, "must divide the heads", lumina_next, keep, "forward", heads=(2, 1))
    model, inputs = z_image()
    plan = {"config": config(mesh), "cp_plan": {}}
    found["plan"] = refuses(ValueError, "takes no cp_plan", model.enable_parallelism, **plan)
    anything = ContextParallelConfig(ulysses_degree=mesh[1], ulysses_anything=True)
    found["any length"] = refuses(ValueError, "without", model.enable_parallelism, config=anything)
    model.enable_parallelism(config=config(mesh))
    model.set_attention_backend("native")
    found["twice"] = refuses(
        RuntimeError, "called twice", model.enable_parallelism, config=config(mesh)
    )
    found["backend, later"] = refuses(ValueError, 'must be "lumina"', model, **inputs)
    model, inputs = z_image(controlled=True)
    model.enable_parallelism(config=config(mesh))
    inputs["controlnet_block_samples"] = {0: randn(2, 33, 32)}
    found["tokens"] = refuses(RuntimeError, "must match the size", model, **inputs)

    q, parallel = randn(2, 4, 4, 8), model._parallel_config
    attend = functools.partial(
        dispatch_attention_fn, q, q, q, backend="lumina", parallel_config=parallel
    )
    pairs = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    odd = torch.ones(2, 5, dtype=torch.bool)
    for name, kind, text, options in (
        ("pairs", NotImplementedError, "masks of keys", {"attn_mask": pairs}),
        ("mask", ValueError, "attn_mask must be", {"attn_mask": odd}),
        ("causal", NotImplementedError, "no causal", {"is_causal": True}),
        ("lse", NotImplementedError, "no return_lse", {"attention_kwargs": {"return_lse": True}}),
    ):
        found[name] = refuses(kind, text, attend, **options)
    parallel.context_parallel_config.ulysses_anything = True
    found["anything"] = refuses(NotImplementedError, "ulysses_anything", attend)
    return found
