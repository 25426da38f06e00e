"""Bad input: one clear error each, before any work."""

import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from pipelines.runs import FAMILIES, SMALL, generator

import lumina

TENSOR = torch.zeros(1, 4, 32)
WRONG = [  # error, what it says, arguments
    (ValueError, "give either prompt or prompt_embeds, got neither", {"prompt": None}),
    (ValueError, "at least one prompt, got an empty list", {"prompt": []}),
    (TypeError, "prompt must be a str or a list of them, got int", {"prompt": 3}),
    (TypeError, "prompt must be a str or a list of them, got list with NoneType",
     {"prompt": ["a", None]}),
    (TypeError, "negative_prompt must be a str or a list of them, got bytes",
     {"negative_prompt": b"a"}),
    (ValueError, "one negative prompt for each of the 2 prompts, got 3",
     {"prompt": ["a", "b"], "negative_prompt": ["c"] * 3}),
    (ValueError, "height must be a whole multiple of 16 pixels, got 40", {"height": 40}),
    (ValueError, "width must be a whole multiple of 16 pixels, got 0", {"width": 0}),
    (ValueError, "width must be a whole multiple of 16 pixels, got -16", {"width": -16}),
    (ValueError, "height must be a whole multiple of 16 pixels, got 64.0", {"height": 64.0}),
    (ValueError, "height must be a whole multiple of 16 pixels, got True", {"height": [True]}),
    (ValueError, "one for each of the 1 prompts, got 2", {"height": [64, 32]}),
    (ValueError, "num_inference_steps must be a whole number above 0, got 0",
     {"num_inference_steps": 0}),
    (ValueError, "num_inference_steps must be a whole number above 0, got 2.5",
     {"num_inference_steps": 2.5}),
    (ValueError, "num_images_per_prompt must be a whole number above 0, got 0",
     {"num_images_per_prompt": 0}),
    (ValueError, "max_sequence_length must be a whole number above 0, got -1",
     {"max_sequence_length": -1}),
    (ValueError, "output_type must be one of pil, np, pt, latent, got 'png'",
     {"output_type": "png"}),
    (ValueError, "one generator, or 1, one for each picture, got 2",
     {"generator": [generator(), generator()]}),
    (ValueError, re.escape("sigmas must fall from at most 1 to above 0, got [0."),
     {"sigmas": [0.5, 0.7]}),
    (ValueError, "sigmas must fall", {"sigmas": []}),
    (ValueError, "sigmas must fall", {"sigmas": [0.5, 0.0]}),
    (ValueError, "give sigmas or schedule, not both", {"sigmas": [1.0], "schedule": "uniform"}),
    (ValueError, "schedule must be one of", {"schedule": "cosine"}),
    (ValueError, "solver must be one of", {"solver": "ddim"}),
    (ValueError, "rtol", {"solver": "dopri5", "rtol": -1}),
    (ValueError, r"with an image, sigmas must begin at 1, got 0.5: strength",
     {"sigmas": [0.5, 0.2], "image": torch.zeros(1, 3, 64, 64)}),
    (TypeError, "each of sigmas must be a number, got str", {"sigmas": ["1"]}),
    (ValueError, "each of sigmas must be finite, got nan", {"sigmas": [float("nan")]}),
    (TypeError, "sigmas must be a list of numbers, got float", {"sigmas": 0.5}),
    (TypeError, "solver must be a str, got list", {"solver": ["euler"]}),
    (TypeError, "schedule must be a str or a function, got int", {"schedule": 3}),
    (TypeError, "rtol must be a number, got str", {"rtol": "x"}),
    (TypeError, "rope_scaling must be a lumina.RopeScaling, got str", {"rope_scaling": "ntk"}),
    (TypeError, "context_drop must be a lumina.ContextDrop, got int", {"context_drop": 2}),
    (ValueError, "base_seqlen must be a whole number from 2 on, got 'x'", {"base_seqlen": "x"}),
    (ValueError, "base_seqlen must be a whole number from 2 on, got 1", {"base_seqlen": 1}),
    (TypeError, "generator must be a torch.Generator or a list of them, got int", {"generator": 3}),
    (TypeError, "a list of them, got list with others", {"generator": [3]}),
    (TypeError, "callback_on_step_end must be a function, got int", {"callback_on_step_end": 3}),
    (TypeError, "regions must be pairs of a box .* got None", {"regions": None}),
    (TypeError, "regions must be pairs of a box .* got <generator",
     {"regions": (x for x in [(None, "a")])}),
    (TypeError, "regions must be pairs of a box", {"regions": [(3, "a")]}),
    (TypeError, "strength must be a number, got str",
     {"strength": "x", "image": torch.zeros(1, 3, 64, 64)}),
    (ValueError, "guidance_scale must be finite, got nan", {"guidance_scale": float("nan")}),
    (ValueError, "guidance_scale must be finite, got inf", {"guidance_scale": float("inf")}),
    (ValueError, "image must be one, or one for each prompt, got 2",
     {"prompt": list("abcd"), "image": torch.zeros(2, 3, 64, 64)}),
    (ValueError, "image must be one, or one for each prompt, got 2",
     {"num_images_per_prompt": 2, "image": torch.zeros(2, 3, 64, 64)}),
    (ValueError, "image must be of bytes, bool or floats, got torch.int64",
     {"image": torch.zeros(3, 64, 64, dtype=torch.int64)}),
    (ValueError, "image must be of bytes, bool or floats, got uint16",
     {"image": np.zeros((64, 64, 3), dtype=np.uint16)}),
    (ValueError, re.escape("image must have the shape (1 or 3, height, width), got (4, 64, 64)"),
     {"image": torch.zeros(4, 64, 64)}),
    (ValueError, "latents must be of the shapes", {"latents": torch.zeros(1, 3, 8, 8)}),
    (TypeError, "latents must be a tensor or a list of them, got str", {"latents": "noise"}),
    (TypeError, "guidance_scale must be a number, got str", {"guidance_scale": "4"}),
    (TypeError, "guidance must be a lumina.Guidance, got float", {"guidance": 4.0}),
    (ValueError, "callback_on_step_end_tensor_inputs must be among latents, prompt_embeds.*noise",
     {"callback_on_step_end_tensor_inputs": ["noise"]}),
    (ValueError, "strength and mask_image need an image", {"strength": 0.5}),
    (ValueError, "strength and mask_image need an image", {"mask_image": torch.zeros(1, 64, 64)}),
    (ValueError, re.escape("strength must lie in (0, 1], got 0"),
     {"strength": 0, "image": torch.zeros(1, 3, 64, 64)}),
    (ValueError, "image must be pictures of PIL, NumPy or PyTorch", {"image": "cat.png"}),
    (ValueError, "image must be one, or one for each prompt, got 2",
     {"image": torch.zeros(2, 3, 64, 64)}),
    (TypeError, r"Pipeline\(\) got an unexpected keyword argument 'solvers'", {"solvers": "heun"}),
]  # fmt: skip
EMBEDS = [
    (ValueError, "give either prompt or prompt_embeds, got both", {"prompt": "a"}),
    (ValueError, "prompt_embeds need their attention mask", {"prompt_attention_mask": None}),
    (ValueError, re.escape("prompt_embeds must have the shape (B, T, 32)"),
     {"prompt_embeds": torch.zeros(1, 4, 31)}),
    (ValueError, "got 2 as embeddings", {
        "negative_prompt_embeds": TENSOR.expand(2, -1, -1),
        "negative_prompt_attention_mask": torch.ones(2, 4),
    }),
    (ValueError, "either negative_prompt or negative_prompt_embeds, got both", {
        "negative_prompt": "a", "negative_prompt_embeds": TENSOR,
        "negative_prompt_attention_mask": torch.ones(1, 4),
    }),
]  # fmt: skip


@contextmanager
def no_work(pipe):
    """Fails where a part is run."""

    def refuse(module, *_):
        raise AssertionError(f"{type(module).__name__} has run")

    parts = (pipe.text_encoder, pipe.transformer, pipe.vae.encoder, pipe.vae.decoder)
    hooks = [part.register_forward_pre_hook(refuse) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("error, message, wrong", WRONG, ids=lambda x: str(x)[:40])
def test_arguments(family, error, message, wrong, ours):
    pipe = ours[family]
    with no_work(pipe), pytest.raises(error, match=message):
        pipe(**{"prompt": "a", **SMALL, **wrong})


@pytest.mark.parametrize("error, message, wrong", EMBEDS, ids=lambda x: str(x)[:40])
def test_embeddings(error, message, wrong, ours):
    pipe = ours["lumina_next"]
    given = {"prompt_embeds": TENSOR, "prompt_attention_mask": torch.ones(1, 4), **SMALL}
    with no_work(pipe), pytest.raises(error, match=message):
        pipe(**{**given, **wrong})


@pytest.mark.parametrize("family", ("lumina2", "z_image"))
def test_what_is_said_of_attention(family, ours):
    name = "attention_kwargs" if family == "lumina2" else "joint_attention_kwargs"
    with no_work(ours[family]):
        with pytest.raises(ValueError, match=f"{name} takes a scale alone, got mask"):
            ours[family]("a", **SMALL, **{name: {"mask": 1}})
        with pytest.raises(TypeError, match=f"scale of {name} must be a number"):
            ours[family]("a", **SMALL, **{name: {"scale": "1"}})


def test_regions(ours):
    box = (0, 0, 0.5, 1)
    for error, message, wrong in (
        (TypeError, "regions must be pairs of a box", {"regions": [box]}),
        (TypeError, "regions must be pairs of a box", {"regions": [((0, 0, 1), "a")]}),
        (TypeError, "regions must be pairs of a box", {"regions": [(box, 1)]}),
        (ValueError, "a box must be left,top,right,bottom", {"regions": [((1, 0, 0, 1), "a")]}),
        (ValueError, "holds no token", {"regions": [((0, 0, 0.01, 1), "a")]}),
        (ValueError, "one prompt and one size", {"regions": [(box, "a")], "prompt": ["a", "b"]}),
        (ValueError, "one prompt and one size", {"regions": [(box, "a")], "height": [64]}),
        (ValueError, "callback can not change prompt_embeds",
         {"regions": [(box, "a")], "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}),
    ):  # fmt: skip
        with no_work(ours["lumina_next"]), pytest.raises(error, match=message):
            ours["lumina_next"](**{"prompt": "a", **SMALL, **wrong})
    for family in ("lumina2", "z_image"):
        with no_work(ours[family]), pytest.raises(ValueError, match="regions are for Lumina-Next"):
            ours[family]("a", **SMALL, regions=[(box, "a")])


def test_a_callback_that_returns_another_shape(ours):
    def callback(pipe, i, t, kwargs):
        return {"prompt_embeds": kwargs["prompt_embeds"][:, 1:]}

    with pytest.raises(ValueError, match="prompt_embeds of the callback must keep the shape"):
        ours["lumina_next"](
            "a", **SMALL, callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("said", (True, 0, "latents", torch.zeros(1), [1]), ids=type)
def test_a_callback_that_returns_no_dict(family, said, ours):
    message = f"must return None or a dict of tensors, got {type(said).__name__}"
    with pytest.raises(TypeError, match=message):
        ours[family]("a", **SMALL, callback_on_step_end=lambda *_: said)
    ours[family]("a", **SMALL, callback_on_step_end=lambda *_: {})


def test_a_callback_that_changes_the_prompts_of_regions(ours):
    """Though it has not asked for them."""

    def callback(pipe, i, t, kwargs):
        return {"prompt_embeds": TENSOR}

    with pytest.raises(ValueError, match="callback can not change prompt_embeds of regions"):
        ours["lumina_next"]("a", **SMALL, regions=[(None, "b")], callback_on_step_end=callback)


def test_the_callers_lists_stay(ours):
    """ZImagePipeline of diffusers writes its template into them."""
    for family in FAMILIES:
        prompts, negative = ["A Cat", "b"], ["c", "d"]
        embeds = ours[family].encode_prompt(prompts, negative_prompt=negative)
        ours[family](prompts, negative_prompt=negative, **SMALL)
        assert (prompts, negative) == (["A Cat", "b"], ["c", "d"]) and len(embeds) in (2, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_that_are_not_finite(family, ours):
    """Of a VAE in float16 above all: no black picture, but what to do."""
    pipe = ours[family]
    bias = pipe.vae.decoder.conv_out.bias
    before = bias.detach().clone()
    arguments = {**SMALL, "output_type": "np", "num_inference_steps": 1}
    try:
        bias.data[0] = float("nan")
        with pytest.raises(FloatingPointError, match="the VAE overflows in torch.float32"):
            pipe("a", **arguments)
    finally:
        bias.data.copy_(before)
    latents = torch.full((1, pipe.vae.config.latent_channels, 8, 8), float("inf"))
    with pytest.raises(FloatingPointError, match="network gave latents that are not finite"):
        pipe("a", latents=latents, **arguments)


def test_a_vae_that_overflows_in_half_precision(folders, ours):
    """Really: its activations pass 65504."""
    pipe = ours["lumina_next"]
    vae = type(pipe.vae).from_pretrained(folders["lumina_next"] / "vae", torch_dtype=torch.float16)
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(3e4)
    kind = type(pipe)
    half = kind(pipe.transformer, pipe.scheduler, vae, pipe.text_encoder, pipe.tokenizer)
    half.set_progress_bar_config(disable=True)
    arguments = {**SMALL, "output_type": "np", "num_inference_steps": 1}
    with pytest.raises(FloatingPointError, match=r"VAE overflows in torch.float16: pipe.vae.to\("):
        half("a", **arguments)
    half.vae.to(torch.float32)  # as the error says
    assert half("a", **arguments).images.shape == (1, 64, 64, 3)


def test_a_wrong_pipeline_for_a_network(ours):
    a, b = ours["lumina_next"], ours["lumina2"]
    rest = a.scheduler, a.vae, a.text_encoder, a.tokenizer
    with pytest.raises(TypeError, match="LuminaPipeline must be a lumina.NextDiT, or contain one"):
        type(a)(b.transformer, *rest)
    with pytest.raises(TypeError, match="transformer of a LuminaPipeline must be .* got str"):
        type(a)("folder", *rest)
    with pytest.raises(ValueError, match="vae must have the transformer's 16 latent channels"):
        type(b)(b.transformer, *rest)
    assert isinstance(a.transformer, lumina.NextDiT)


def test_parts_of_another_kind(ours):
    pipe = ours["lumina_next"]
    good = {name: getattr(pipe, name) for name in pipe.components}
    for error, message, wrong in (
        (TypeError, "vae must be an AutoencoderKL or AutoencoderTiny, got Linear",
         {"vae": torch.nn.Linear(1, 1)}),
        (TypeError, "scheduler must be a FlowMatchEulerDiscreteScheduler", {"scheduler": None}),
        (TypeError, "text_encoder must be a module, got str", {"text_encoder": "gemma"}),
        (TypeError, "tokenizer must be one of transformers, got str", {"tokenizer": "gemma"}),
        (ValueError, "a text_encoder needs its tokenizer, got None", {"tokenizer": None}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            type(pipe)(**{**good, **wrong})
    config = {**pipe.scheduler.config, "stochastic_sampling": True}
    with pytest.raises(ValueError, match="scheduler must not have stochastic_sampling"):
        type(pipe)(**{**good, "scheduler": type(pipe.scheduler).from_config(config)})


def test_a_pipeline_without_some_parts(ours):
    pipe = ours["lumina_next"]
    bare = type(pipe)(pipe.transformer, pipe.scheduler, None, None, None)
    bare.set_progress_bar_config(disable=True)
    embeds = {"prompt_embeds": TENSOR, "prompt_attention_mask": torch.ones(1, 4)}
    embeds |= {f"negative_{name}": value for name, value in embeds.items()}
    assert bare(**embeds, **SMALL).images.shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="pictures need a vae, this pipeline has none"):
        bare(**embeds, **{**SMALL, "output_type": "pt"})
    with pytest.raises(ValueError, match="prompts need a text_encoder and a tokenizer"):
        bare("a", **SMALL)
