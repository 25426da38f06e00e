"""Our pipelines give what diffusers' give, parameter by parameter, on the same parts."""

import inspect
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from pipelines.conftest import Made
from pipelines.runs import FAMILIES, PROMPTS, SMALL, distance, draw, generator

JOINT = ("lumina2", "z_image")
SAME = 1e-4


def latent(family, seed=5, batch=1):
    shape = (batch, 4 if family == "lumina_next" else 16, 8, 8)
    return torch.randn(shape, generator=generator(seed))


def embeddings(family, batch=2):
    """Features of unequal lengths, as each pipeline takes them."""
    feats = [torch.randn(n, 32, generator=generator(n)) for n in (5, 9)[:batch]]
    bad = [torch.randn(9, 32, generator=generator(n)) for n in (1, 2)[:batch]]
    if family == "z_image":
        return {"prompt_embeds": feats, "negative_prompt_embeds": bad}
    padded, mask = torch.zeros(batch, 9, 32), torch.zeros(batch, 9, dtype=torch.long)
    for i, each in enumerate(feats):
        padded[i, : len(each)], mask[i, : len(each)] = each, 1
    return {
        "prompt_embeds": padded,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": torch.stack(bad),
        "negative_prompt_attention_mask": torch.ones(batch, 9, dtype=torch.long),
    }


def changed(pipe, i, t, kwargs):
    """A callback that changes what it gets."""
    assert isinstance(t, torch.Tensor) and 0 < t <= 1000
    return {name: CALLBACK[name](value) for name, value in kwargs.items()}


CALLBACK = {  # the networks norm the text, so that a factor would be lost
    "latents": lambda z: z * 1.1,
    "prompt_embeds": lambda f: [z.roll(1, -1) for z in f] if isinstance(f, list) else f.roll(1, -1),
}


CHANGES = {  # name: what changes; those with "families" exist there alone
    "prompt": {"prompt": PROMPTS[1]},
    "steps": {"num_inference_steps": 5},
    "size": {"height": 64, "width": 96},
    "tall": {"height": 128, "width": 64},
    "guidance": {"guidance_scale": 7.5},
    "no guidance": {"guidance_scale": 0.0},
    "weak guidance": {"guidance_scale": 1.0},
    "negative": {"prompt": PROMPTS[1], "negative_prompt": "Blurry"},
    "sigmas": {"sigmas": [1.0, 0.6, 0.3]},
    "sigmas from the middle": {"sigmas": [0.9, 0.5, 0.1]},
    "pictures": {"num_images_per_prompt": 2},
    "generators": {"num_images_per_prompt": 2, "generator": [3, 4]},
    "latents": {"latents": True},
    "callback": {"callback_on_step_end": changed},
    "callback on text": {
        "callback_on_step_end": changed,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    },
    "watershed": {"families": ["lumina_next"], "scaling_watershed": 0.3, "height": 128},
    "no watershed": {"families": ["lumina_next"], "scaling_watershed": 0.0, "height": 128},
    "no proportional": {"families": ["lumina_next"], "proportional_attn": False, "height": 128},
    "not cleaned": {"families": ["lumina_next"], "clean_caption": False},
    "system prompt": {"families": ["lumina2"], "system_prompt": "Draw."},
    "truncation by ratio": {"families": ["lumina2"], "cfg_trunc_ratio": 0.4},
    "never guided": {"families": ["lumina2"], "cfg_trunc_ratio": 0.0},
    "no rows": {"families": ["lumina2"], "cfg_normalization": False},
    "truncation": {"families": ["z_image"], "cfg_truncation": 0.3, "num_inference_steps": 5},
    "no truncation": {"families": ["z_image"], "cfg_truncation": None},
    "norm": {"families": ["z_image"], "cfg_normalization": True},
    "norm of its own": {"families": ["z_image"], "cfg_normalization": 0.7},
    "tokens": {"families": ["z_image", "lumina2"], "max_sequence_length": 128},
}
SAME_AS_BEFORE = ("latents", "not cleaned", "no truncation", "tokens")
CASES = [
    (family, name)
    for name, change in CHANGES.items()
    for family in change.get("families", FAMILIES)
]


@pytest.fixture(scope="module")
def plain(theirs):
    return Made(lambda family: draw(theirs[family]))


@pytest.mark.parametrize("family, name", CASES)
def test_every_parameter(family, name, ours, theirs, plain):
    change = {key: value for key, value in CHANGES[name].items() if key != "families"}
    if "latents" in change:
        change["latents"] = latent(family)
    seeds = change.get("generator")

    def result(pipe):
        if seeds:
            change["generator"] = [generator(seed) for seed in seeds]
        return draw(pipe, **dict(change))

    expected = result(theirs[family])
    got = result(ours[family])
    assert distance(got, expected) < SAME and got.dtype == expected.dtype
    if expected.shape == plain[family].shape and name not in SAME_AS_BEFORE:
        assert distance(expected, plain[family]) > 1e-3 or name == "norm"  # it does something


@pytest.mark.parametrize("family", FAMILIES)
def test_three_prompts_of_unequal_length(family, ours, theirs):
    change = {"prompt": PROMPTS, "negative_prompt": ["", "b", "c"]}
    assert distance(draw(ours[family], **change), draw(theirs[family], **change)) < SAME
    alone = draw(ours[family], PROMPTS[1], latents=latent(family))
    change = {"prompt": PROMPTS, "latents": latent(family).expand(3, -1, -1, -1)}
    assert distance(draw(ours[family], **change)[1:2], alone) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_instead_of_prompts(family, ours, theirs):
    change = {"prompt": None, **embeddings(family)}
    got = draw(ours[family], **change)
    assert distance(got, draw(theirs[family], **change)) < SAME
    # Twice each: the pictures of a prompt come one after the other, in every part of the text.
    twice = draw(
        ours[family], **change, num_images_per_prompt=2,
        latents=latent(family, batch=2).repeat_interleave(2, 0),
    )  # fmt: skip
    once = draw(ours[family], **change, latents=latent(family, batch=2))
    assert distance(twice, once.repeat_interleave(2, 0)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_several_pictures_of_several_prompts(family, ours, theirs):
    """diffusers' first two pipelines would mix the masks up: they get single prompts."""
    got = draw(ours[family], PROMPTS[:2], num_images_per_prompt=2)
    expected = draw(theirs[family], [PROMPTS[i // 2] for i in range(4)])
    assert distance(got, expected) < SAME


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", (1, 3))
def test_pictures(family, batch, ours, theirs):
    for kind in ("np", "pt"):
        change = {"prompt": PROMPTS[:batch], "output_type": kind}
        got, expected = draw(ours[family], **change), draw(theirs[family], **change)
        assert type(got) is type(expected) and abs(got - expected).max() < SAME
        assert 0.05 < float(expected.std())
    change["output_type"] = "pil"
    got, expected = draw(ours[family], **change), draw(theirs[family], **change)
    assert len(got) == batch and got[0].size == expected[0].size
    for one, other in zip(got, expected, strict=True):
        one, other = (np.asarray(picture).astype(int) for picture in (one, other))
        # A value at .5 may be rounded either way.
        assert abs(one - other).max() <= 1 and (one != other).mean() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tuple_instead_of_an_object(family, ours):
    arguments = {"prompt": "c", **SMALL}
    (got,) = ours[family](**arguments, generator=generator(), return_dict=False)
    result = ours[family](**arguments, generator=generator())
    assert torch.equal(got, result.images) and "Output" in type(result).__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_the_features(family, ours, theirs):
    arguments = {"prompt": PROMPTS, "negative_prompt": ["", "b", "c"]}
    if family != "z_image":
        arguments["num_images_per_prompt"] = 1
    got = ours[family].encode_prompt(**arguments)
    expected = theirs[family].encode_prompt(**{**arguments, "prompt": list(PROMPTS)})
    if family == "z_image":
        for a, b in zip([*got[0], *got[1]], [*expected[0], *expected[1]], strict=True):
            assert distance(a, b) < 1e-5
    else:
        for i in (0, 2):
            rows = zip(got[i], got[i + 1].bool(), expected[i], expected[i + 1].bool(), strict=True)
            for a, mask_a, b, mask_b in rows:
                assert distance(a[mask_a], b[mask_b]) < 1e-5
        assert got[1].dtype == expected[1].dtype
    # What one returns the other takes.
    if family == "z_image":
        change = {"prompt_embeds": got[0], "negative_prompt_embeds": got[1]}
    else:
        names = ("prompt_embeds", "prompt_attention_mask")
        names += tuple(f"negative_{name}" for name in names)
        change = dict(zip(names, got, strict=True))
    a, b = (draw(pipes[family], None, **change) for pipes in (ours, theirs))
    assert distance(a, b) < SAME


@pytest.mark.parametrize("family", FAMILIES)
def test_no_negative_prompt_is_read_without_guidance(family, ours):
    seen = []
    hook = ours[family].text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    try:
        draw(ours[family], guidance_scale=0.0)
        assert len(seen) == 1
        draw(ours[family], ["a"] * 3, guidance_scale=5.0)
        assert [len(ids) for ids in seen] == [1, 1, 1]  # equal prompts are read once
    finally:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_noise_is_that_of_diffusers_in_every_dtype(family, ours, theirs):
    from lumina.pipelines.pictures import draw_noise

    channels = 4 if family == "lumina_next" else 16
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = theirs[family].prepare_latents(
            2, channels, 64, 96, dtype, torch.device("cpu"), generator(), None
        )
        plan = SimpleNamespace(channels=channels, sizes=[(8, 12)] * 2, ragged=False)
        got = draw_noise(plan, generator(), dtype, torch.device("cpu"))
        assert got.dtype == torch.float32 and torch.equal(got, expected.float())


@pytest.mark.parametrize("family", JOINT)
def test_dynamic_shifting(family, ours, theirs):
    """By the tokens of the picture; Lumina2Pipeline gives diffusers' scheduler its channels."""
    config = {**ours[family].scheduler.config, "use_dynamic_shifting": True}
    before = ours[family].scheduler, theirs[family].scheduler
    kind = diffusers.FlowMatchEulerDiscreteScheduler
    ours[family].scheduler, theirs[family].scheduler = (kind.from_config(config) for _ in "ab")
    try:
        got = draw(ours[family], height=128)
        used = ours[family].scheduler.sigmas
        if family == "z_image":
            assert distance(got, draw(theirs[family], height=128)) < SAME
        shift = torch.tensor(0.5 + (1.15 - 0.5) * (8 * 4 - 256) / (4096 - 256)).exp()
        sigmas = torch.tensor([1, 2 / 3, 1 / 3])
        expected = shift / (shift + 1 / sigmas - 1)
        assert distance(used[:3], expected) < 1e-6
    finally:
        ours[family].scheduler, theirs[family].scheduler = before


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameters_are_diffusers(family, ours, theirs):
    for method in ("__call__", "encode_prompt"):
        mine, other = (
            inspect.signature(getattr(type(pipes[family]), method)).parameters
            for pipes in (ours, theirs)
        )
        names = [name for name in other if name != "kwargs"]
        assert [name for name in mine if name in names] == names
        for name in names:
            given, default = mine[name].default, other[name].default
            assert given == (tuple(default) if isinstance(default, list) else default), name


def test_every_parameter_is_changed_once():
    tested = {key for change in CHANGES.values() for key in change}
    elsewhere = {
        "output_type", "return_dict", "attention_kwargs", "joint_attention_kwargs", "self",
        "prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask",
        "negative_prompt_attention_mask",
    }  # fmt: skip
    for kind in (diffusers.LuminaPipeline, diffusers.Lumina2Pipeline, diffusers.ZImagePipeline):
        assert inspect.signature(kind.__call__).parameters.keys() <= tested | elsewhere
