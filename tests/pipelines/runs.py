"""How the tests call pipelines: small pictures, few steps, the same seed."""

import warnings

import torch

FAMILIES = ("lumina_next", "lumina2", "z_image")
SMALL = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
PROMPTS = ["a red apple", " Two cats sleep under an old tree, 桌子上的红苹果 🍎, by the Sea ", "c"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(pipe, prompt="a red apple", **changes):
    """The images of a call; no warning of diffusers' about what is not installed."""
    arguments = {**SMALL, **changes}
    if prompt is not None:
        # A list of its own: ZImagePipeline of diffusers writes into it.
        arguments["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
    if "latents" not in arguments:
        arguments.setdefault("generator", generator())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return pipe(**arguments).images


def distance(a, b):
    """max |a - b| over the rms of b."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape, (a.shape, b.shape)
    assert torch.isfinite(b).all()
    return ((a - b).abs().max() / b.square().mean().sqrt()).item()


def noise(family, batch=1, height=8, width=8, seed=1):
    shape = (batch, 4 if family == "lumina_next" else 16, height, width)
    return torch.randn(shape, generator=generator(seed))


def features(pipe, prompt="a red apple"):
    """As arguments of the pipeline, and of lumina.sample."""
    feats = pipe.encode_prompt(prompt)
    if isinstance(feats[0], list):
        given = dict(zip(("prompt_embeds", "negative_prompt_embeds"), feats, strict=True))
        return given, (feats[0][0][None], None, feats[1][0][None], None)
    names = ("prompt_embeds", "prompt_attention_mask")
    given = dict(zip((*names, *(f"negative_{name}" for name in names)), feats, strict=True))
    return given, (feats[0], feats[1].bool(), feats[2], feats[3].bool())
