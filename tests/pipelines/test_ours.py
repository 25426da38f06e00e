"""What our pipelines take beyond diffusers' parameters."""

import pytest
import torch
from pipelines.runs import FAMILIES, PROMPTS, SMALL, distance, draw, features, generator, noise

import lumina
from lumina.pipelines.lumina2 import RowGuidance


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("solver", ("midpoint", "heun", "rk4", "ab2", "dopri5"))
def test_solver_schedule_and_guidance(family, solver, ours):
    """What the sampler gives when it is called by hand."""
    pipe, x = ours[family], noise(family)
    options = {
        "solver": solver,
        "schedule": "rational:2",
        "guidance": lumina.Guidance(3.0, until=0.7, renorm=1.0),
        "context_drop": lumina.ContextDrop(),
        "rope_scaling": lumina.RopeScaling("time_aware", factor=2.0),
        "base_seqlen": 64,
        "rtol": 1e-2,
    }
    given, feats = features(pipe)
    got = draw(pipe, None, latents=x, **given, **options)
    expected = lumina.sample(
        pipe.transformer, *feats, size=(8, 8), latents=x, steps=3, **options
    ).latents
    assert distance(got, expected) < 1e-5
    if solver == "midpoint":
        for name in options.keys() - {"rtol"}:
            less = {key: value for key, value in options.items() if key != name}
            assert distance(draw(pipe, None, latents=x, **given, **less), got) > 1e-4, name


def test_a_schedule_as_a_function(ours):
    grid, x = torch.tensor([0, 0.2, 1.0], dtype=torch.float64), noise("lumina_next")
    seen = []

    def callback(pipe, i, t, kwargs):
        seen.append((i, round(float(t), 3), pipe.num_timesteps, pipe.guidance_scale))
        assert pipe.do_classifier_free_guidance and not pipe.interrupt

    draw(ours["lumina_next"], latents=x, schedule=lambda n: grid, callback_on_step_end=callback)
    assert seen == [(0, 1000.0, 2, 4.0), (1, 800.0, 2, 4.0)]


@pytest.mark.parametrize("family", FAMILIES)
def test_several_sizes_in_a_call(family, ours):
    """As one by one, with one grid; the pictures of a prompt share its size."""
    pipe, sizes = ours[family], [(64, 96), (96, 64), (64, 64)]
    scaling = {"rope_scaling": lumina.RopeScaling("ntk", base_size=4), "base_seqlen": 16}
    latents = [noise(family, 1, h // 8, w // 8)[0] for h, w in sizes]
    change = {"height": [h for h, _ in sizes], "width": [w for _, w in sizes], **scaling}
    together = draw(pipe, PROMPTS, latents=latents, **change)
    assert isinstance(together, list)
    for i, (height, width) in enumerate(sizes):
        alone = draw(
            pipe, PROMPTS[i], height=height, width=width, latents=latents[i][None], **scaling
        )
        assert distance(together[i], alone[0]) < 1e-5
    for kind, shape in (("np", (64, 96, 3)), ("pt", (3, 64, 96))):
        first, *_ = draw(pipe, PROMPTS, **change, output_type=kind)
        assert first.shape == shape
    change["height"] = 64
    sizes = [p.size for p in draw(pipe, PROMPTS, **change, num_images_per_prompt=2,
                                  output_type="pil")]  # fmt: skip
    assert sizes == [(96, 64), (96, 64), *[(64, 64)] * 4]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sides", ([64, 96, 128], [32, 96, 64], [32, 48, 48]))
def test_several_sizes_by_default(family, sides, ours):
    """Above and below that of training: Lumina-Next turns positions by the size of each picture."""
    pipe, latents = ours[family], [noise(family, 1, side // 8, 8)[0] for side in sides]
    assert pipe.default_image_size == (1024 if family == "z_image" else 64)
    together = draw(pipe, PROMPTS, latents=latents, height=sides)
    for i, side in enumerate(sides):
        alone = draw(pipe, PROMPTS[i], latents=latents[i][None], height=side)
        assert distance(together[i], alone[0]) < 1e-5, side
    seen, pictures = [], []

    def callback(pipe, i, t, kwargs):
        seen.append(i)
        pictures.append(len(kwargs["latents"]))

    draw(pipe, PROMPTS, latents=latents, height=sides, callback_on_step_end=callback)
    runs = len(set(sides)) if family == "lumina_next" and min(sides) < 64 else 1
    assert seen == [0, 1, 2] * runs and sum(pictures) == 3 * 3


def test_the_noise_of_several_sizes(ours):
    pipe, seeds = ours["lumina_next"], (3, 4)
    together = draw(
        pipe, ["a", "b"], height=[64, 96], generator=[generator(s) for s in seeds],
        scaling_watershed=None,
    )  # fmt: skip
    for i, (prompt, height) in enumerate((("a", 64), ("b", 96))):
        alone = draw(
            pipe, prompt, height=height, generator=generator(seeds[i]), scaling_watershed=None
        )
        assert distance(together[i], alone[0]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_can_be_ended(family, ours):
    def callback(pipe, i, t, kwargs):
        pipe._interrupt = i == 1
        return {"latents": kwargs["latents"] * 2} if i == 1 else None

    def kept(pipe, i, t, kwargs):
        seen.append(kwargs["latents"].clone())

    seen, x = [], noise(family)
    draw(ours[family], latents=x, callback_on_step_end=kept)
    got = draw(ours[family], latents=x, callback_on_step_end=callback)
    assert len(seen) == 3 and distance(got, seen[1] * 2) < 1e-6
    assert torch.equal(draw(ours[family], latents=x), draw(ours[family], latents=x))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_callback_of_pictures_one_by_one(family, ours):
    """dopri5: each of them is seen, and its features changed, as alone."""
    pipe, x = ours[family], noise(family, 2)
    change = {"solver": "dopri5", "rtol": 0.01, "atol": 0.01}
    change["callback_on_step_end_tensor_inputs"] = ["latents", "prompt_embeds"]
    seen = []

    def callback(pipe, i, t, kwargs):
        embeds = kwargs["prompt_embeds"]
        seen.append((i, len(kwargs["latents"]), len(embeds)))
        changed = [z.roll(1, -1) for z in embeds] if family == "z_image" else embeds.roll(1, -1)
        return {"prompt_embeds": changed} if i == 0 else None

    together = draw(pipe, ["a", "the sea"], latents=x, callback_on_step_end=callback, **change)
    both, seen = seen, []
    for i, prompt in enumerate(("a", "the sea")):
        alone = draw(pipe, prompt, latents=x[i : i + 1], callback_on_step_end=callback, **change)
        assert distance(together[i : i + 1], alone) < 1e-4
        del change["callback_on_step_end_tensor_inputs"]
        assert distance(draw(pipe, prompt, latents=x[i : i + 1], **change), alone) > 1e-3
        change["callback_on_step_end_tensor_inputs"] = ["latents", "prompt_embeds"]
    assert both == seen and both[0] == (0, 1, 2 if family == "lumina_next" else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_one_by_one_can_be_ended(family, ours):
    """The first where it is ended, the others after a step."""
    pipe, x, seen = ours[family], noise(family, 3), []

    def callback(pipe, i, t, kwargs):
        seen.append(i)
        pipe._interrupt |= i == 1
        return {"latents": torch.full_like(kwargs["latents"], len(seen))}

    got = draw(pipe, PROMPTS, latents=x, solver="dopri5", atol=1e-5, rtol=1e-5,
               callback_on_step_end=callback)  # fmt: skip
    assert seen == [0, 1, 0, 0] and got[:, 0, 0, 0].tolist() == [2, 3, 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_used_is_not_encoded(family, ours):
    """The negative prompt, where no step that is run is guided."""
    pipe, picture, x = ours[family], torch.rand(3, 64, 64), noise(family)
    change = {"latents": x, "image": picture, "schedule": "uniform", "num_inference_steps": 4}
    words = []
    hook = pipe.text_encoder.register_forward_pre_hook(
        lambda *args: words.append(len(args[2]["input_ids"])), with_kwargs=True
    )
    try:
        rule = lumina.Guidance(3.0, until=0.5)
        got = draw(pipe, strength=0.5, guidance=rule, **change)
        assert words == [1] and not pipe.do_classifier_free_guidance
        draw(pipe, strength=0.51, guidance=rule, **change)
        assert words == [1] * 3 and pipe.do_classifier_free_guidance
    finally:
        hook.remove()
    assert torch.equal(got, draw(pipe, strength=0.5, guidance=lumina.Guidance(1.0), **change))


@pytest.mark.parametrize("strength, rows", ((0.75, [2, 1, 1]), (0.5, [1, 1])))
def test_the_steps_before_an_image_count(strength, rows, ours):
    """cfg_trunc_ratio is of the whole grid: of four steps the first two are guided."""
    seen, pipe = [], ours["lumina2"]
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, out: seen.append(len(out)) if isinstance(out, torch.Tensor) else None
    )
    try:
        draw(pipe, cfg_trunc_ratio=0.5, image=torch.rand(3, 64, 64), strength=strength,
             schedule="uniform", num_inference_steps=4)  # fmt: skip
    finally:
        hook.remove()
    assert seen == rows


def test_a_callback_of_diffusers(ours):
    from diffusers.callbacks import PipelineCallback

    class Doubled(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": callback_kwargs["latents"] * 2}

    pipe, x = ours["lumina_next"], noise("lumina_next")
    got = draw(pipe, latents=x, callback_on_step_end=Doubled(cutoff_step_ratio=1.0),
               num_inference_steps=1)  # fmt: skip
    assert distance(got, 2 * draw(pipe, latents=x, num_inference_steps=1)) < 1e-6


def test_rows_keep_their_norm():
    v_c, v_u = torch.randn(2, 4, 3, 5)
    v_u[0, 0] = v_c[0, 0] = 0
    v = RowGuidance(4.0).velocity(v_c, v_u)
    assert distance(v.norm(dim=-1), v_c.norm(dim=-1)) < 1e-6 and torch.isfinite(v).all()
    direction = lumina.Guidance(4.0).velocity(v_c, v_u)
    assert (torch.cosine_similarity(v, direction, dim=-1)[1:] > 0.9999).all()
    assert RowGuidance(4.0).velocity(v_c.half(), v_u.half()).dtype == torch.float32


def test_the_shift_of_positions(ours):
    """None turns it off, also for small pictures, which diffusers always stretches."""
    pipe, x = ours["lumina_next"], noise("lumina_next", 1, 16, 8)
    change = {"latents": x, "height": 128, "width": 64}
    off = draw(pipe, scaling_watershed=None, **change)
    assert torch.equal(off, draw(pipe, rope_scaling=lumina.RopeScaling("none"), **change))
    assert distance(off, draw(pipe, **change)) > 1e-3


def test_large_pictures_by_tiles(ours):
    pipe = ours["lumina_next"]
    whole = draw(pipe, height=64, width=256, output_type="pt", num_inference_steps=1)
    pipe.enable_vae_tiling()
    try:
        tiled = draw(pipe, height=64, width=256, output_type="pt", num_inference_steps=1)
    finally:
        pipe.vae.disable_tiling()
    assert tiled.shape == whole.shape == (1, 3, 64, 256) and not torch.equal(tiled, whole)


def test_the_bar_is_that_of_the_pipeline(ours, capsys):
    pipe = ours["lumina_next"]
    pipe.set_progress_bar_config(disable=False, desc="drawing")
    try:
        draw(pipe)
        assert "drawing: 100%" in capsys.readouterr().err
        draw(pipe, solver="dopri5")
        assert "drawing: " in capsys.readouterr().err
    finally:
        pipe.set_progress_bar_config(disable=True)
    draw(pipe)
    assert capsys.readouterr().err == "" and SMALL["num_inference_steps"] == 3


def test_regions(ours):
    """Each part sees its own prompt, all of them the mean of that of the whole; the sampler's rules
    on the features of the parts."""
    pipe, x = ours["lumina_next"], noise("lumina_next", 1, 8, 12)
    parts = [((0, 0, 0.5, 1), "a cat"), (None, "a dog under a tree, by the sea")]
    change = {"latents": x, "width": 96, "scaling_watershed": None, "proportional_attn": False}
    got = draw(pipe, "two animals", regions=parts, **change)
    embeds, mask, negative, no = pipe.encode_prompt(
        ["a cat", parts[1][1], "two animals"], negative_prompt=""
    )
    feats = lumina.place_captions(
        embeds[:2], mask[:2].bool(), [(0, 0, 0.5, 1), (0.5, 0, 1, 1)], (4, 6)
    )
    expected = lumina.sample(
        pipe.transformer, *feats, negative[:1], no[:1].bool(), size=(8, 12), latents=x, steps=3,
        solver="euler", schedule=lambda _: 1 - pipe.scheduler.sigmas.double(),
        guidance=lumina.Guidance(4.0, channels=3), pooled_feats=embeds[2:],
        pooled_mask=mask[2:].bool(),
    ).latents  # fmt: skip
    assert distance(got, expected) < 1e-5
    assert distance(got, draw(pipe, "two animals", **change)) > 1e-3
    everywhere = [((0, 0, 1, 1), "two animals")]
    alone = {**change, "guidance_scale": 1.0}  # else the negative rows have the whole's mean too
    whole = draw(pipe, "two animals", **alone)
    assert distance(draw(pipe, "two animals", regions=everywhere, **alone), whole) < 1e-5
    twice = {**change, "latents": x.expand(2, -1, -1, -1), "num_images_per_prompt": 2}
    assert distance(draw(pipe, "two animals", regions=parts, **twice)[1:], got) < 1e-5
