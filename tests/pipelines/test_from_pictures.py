"""Pictures that our pipelines start from, and masks."""

import numpy as np
import PIL.Image
import pytest
import torch
from pipelines.runs import FAMILIES, distance, draw, features, generator, noise

import lumina
from lumina.pipelines.pictures import prepare


@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_picture(family, ours):
    """Noised to t = 1 - strength exactly; the weaker, the nearer to what the VAE keeps of it."""
    pipe, x = ours[family], noise(family)
    array = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
    picture = PIL.Image.fromarray((array * 255).astype("uint8"))
    with torch.no_grad():
        tensor = torch.from_numpy(np.asarray(picture) / 255).permute(2, 0, 1)[None].float()
        z = pipe.vae.encode(tensor * 2 - 1).latent_dist.mode()
    z = (z - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor
    seen = []

    def callback(pipe, i, t, kwargs):
        seen.append((i, float(t)))

    change = {"latents": x, "schedule": "uniform", "guidance": lumina.Guidance(2.0)}
    if family == "lumina_next":
        change |= {"scaling_watershed": None, "proportional_attn": False}
    got = draw(
        pipe, image=picture, strength=0.5, num_inference_steps=4, callback_on_step_end=callback,
        **change,
    )  # fmt: skip
    guide = {"guidance": change["guidance"], "schedule": "uniform", "solver": "euler"}
    expected = lumina.sample(
        pipe.transformer, *features(pipe)[1], size=(8, 8), latents=x, steps=4, image=z,
        strength=0.5, **guide,
    ).latents  # fmt: skip
    assert distance(got, expected) < 1e-5
    assert seen == [(0, 500.0), (1, 250.0)]
    weak = draw(pipe, image=tensor, strength=0.01, num_inference_steps=4, **change)
    assert distance(weak, z) < 0.2 * distance(got, z)
    assert torch.equal(
        draw(pipe, image=[picture], num_inference_steps=4, **change),
        draw(pipe, image=picture, num_inference_steps=4, strength=0.6, **change),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_for_each_prompt_and_size(family, ours):
    pipe = ours[family]
    a, b = torch.rand(2, 3, 64, 64, generator=generator(7)).unbind()
    both = noise(family, 2)
    change = {"strength": 0.5, "num_inference_steps": 2}
    together = draw(pipe, ["a", "b"], image=[a, b], latents=both, **change)
    for i, each in enumerate((a, b)):
        alone = draw(pipe, "ab"[i], image=each, latents=both[i : i + 1], **change)
        assert distance(together[i : i + 1], alone) < 1e-5
    twice = draw(pipe, ["a", "b"], image=torch.stack([a, b]), num_images_per_prompt=2,
                 latents=both.repeat_interleave(2, 0), **change)  # fmt: skip
    assert distance(twice, together.repeat_interleave(2, 0)) < 1e-5
    sizes = draw(pipe, ["a", "b"], image=a, height=[64, 96], **change)
    assert [tuple(z.shape[1:]) for z in sizes] == [(8, 8), (12, 8)]


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_bytes(family, ours):
    """The same picture in NumPy and PyTorch as in PIL: of any size, gray and of colour."""
    pipe, change = ours[family], {"latents": noise(family), "strength": 0.5}
    array = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    flags = array[..., 0] > 127
    tensor, change["num_inference_steps"] = torch.from_numpy(array).permute(2, 0, 1), 2
    expected = draw(pipe, image=PIL.Image.fromarray(array), **change)
    for same in (array, array[None], [array], tensor, tensor[None], [tensor[None]]):
        assert torch.equal(draw(pipe, image=same, **change), expected)
    gray = draw(pipe, image=PIL.Image.fromarray(array[..., 0]), **change)
    for same in (array[..., 0], array[..., :1], tensor[0], tensor[:1]):
        assert torch.equal(draw(pipe, image=same, **change), gray)
    change |= {"image": array, "strength": None}
    masks = [
        (PIL.Image.fromarray(array), (array, tensor)),
        (PIL.Image.fromarray(array[..., 0]), (array[..., 0], array[..., :1], tensor[0])),
        (PIL.Image.fromarray(flags), (flags, flags[..., None], torch.from_numpy(flags))),
    ]
    for mask, others in masks:
        expected = pipe.mask_processor.preprocess(mask, 64, 64)
        for same in others:
            got = prepare(same, 1, [(64, 64)], pipe.mask_processor, "mask_image")
            assert torch.equal(got[0], expected)
    expected = draw(pipe, mask_image=masks[0][0], **change)
    assert torch.equal(draw(pipe, mask_image=tensor, **change), expected)


def test_floats_are_shares_of_white(ours):
    """In both libraries' order; a mask of colour by its luminance."""
    pipe, array = ours["lumina_next"], np.random.default_rng(0).random((64, 64, 3))
    tensor = torch.from_numpy(array).permute(2, 0, 1).float()
    for picture in (array, tensor):
        got = prepare(picture, 1, [(64, 64)], pipe.image_processor, "image")[0]
        assert torch.equal(got, tensor[None] * 2 - 1)
    light = (tensor * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    for mask in (array, tensor):
        got = prepare(mask, 1, [(64, 64)], pipe.mask_processor, "mask_image")[0]
        assert torch.equal(got[0, 0], (light >= 0.5).float())


@pytest.mark.parametrize("family", FAMILIES)
def test_inpainting(family, ours):
    """What the mask leaves is what the VAE keeps of the picture; the rest is drawn anew."""
    pipe, x = ours[family], noise(family)
    picture = torch.rand(3, 64, 64, generator=generator(7))
    mask = PIL.Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    with torch.no_grad():
        z = pipe.vae.encode(picture[None] * 2 - 1).latent_dist.mode()
    z = (z - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor
    got = draw(pipe, image=picture, mask_image=mask, latents=x)
    assert distance(got[..., :4], z[..., :4]) < 1e-5
    assert distance(got[..., 4:], z[..., 4:]) > 0.1
    assert distance(got[..., 4:], draw(pipe, latents=x)[..., 4:]) > 1e-3
    everything = torch.ones(1, 64, 64)
    assert torch.equal(
        draw(pipe, image=picture, mask_image=everything, latents=x), draw(pipe, latents=x)
    )
    one_pixel = torch.zeros(1, 64, 64)
    one_pixel[0, 17, 63] = 1
    got = draw(pipe, image=picture, mask_image=one_pixel, latents=x)
    changed = (got - z).abs().amax(1)[0] > 1e-4
    assert changed.nonzero().tolist() == [[2, 7]]
    sizes = draw(pipe, ["a", "b"], image=picture, mask_image=mask, height=[64, 96])
    assert [tuple(z.shape[1:]) for z in sizes] == [(8, 8), (12, 8)]
