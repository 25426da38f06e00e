"""Where and how the parts of a pipeline run: by stages, offloaded, in half precision, wrapped."""

import diffusers
import numpy as np
import pytest
import torch
import transformers
from pipelines.runs import FAMILIES, distance, draw, generator

import lumina
from lumina.pipelines import Pipeline, lumina2, z_image
from lumina.pipelines.schedule import time_grid


def is_freed(module):
    return all(t.is_meta for t in [*module.parameters(), *module.buffers()])


@pytest.mark.parametrize("family", FAMILIES)
def test_by_stages(family, folders, ours):
    """The same pictures; text encoder, network and VAE are loaded in turn and freed."""
    pipe = Pipeline.from_pretrained(folders[family], stages=True)
    pipe.set_progress_bar_config(disable=True)
    here = {"text_encoder": [], "transformer": [], "vae": []}
    for name, loader in pipe._loaders.items():

        def counted(name=name, loader=loader):
            assert all(map(is_freed, sum(here.values(), [])))
            here[name].append(loader())
            assert not is_freed(here[name][-1])
            return here[name][-1]

        pipe._loaders[name] = counted
    for part in here:
        assert is_freed(getattr(pipe, part))
    change = {"output_type": "pt", "negative_prompt": "bad"}
    assert torch.equal(draw(pipe, **change), draw(ours[family], **change))
    assert {name: len(parts) for name, parts in here.items()} == dict.fromkeys(here, 1)
    assert all(map(is_freed, sum(here.values(), [])))
    image = torch.rand(1, 3, 64, 64)
    change = {"output_type": "pt", "image": image, "strength": 0.5}
    assert torch.equal(draw(pipe, **change), draw(ours[family], **change))
    with pytest.raises(ValueError, match="by stages, the device and dtype are from_pretrained's"):
        pipe.to(torch.float16)


# Single tensors accelerate moves to an accelerator alone, whole modules also from CPU to CPU.
OFFLOADS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload")
OFFLOADS = OFFLOADS if torch.cuda.is_available() else OFFLOADS[:1]


@pytest.mark.parametrize("way", OFFLOADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_offloading(family, way, folders, ours):
    """Twice, as diffusers puts the hooks in anew after every call."""
    pipe = Pipeline.from_pretrained(folders[family])
    pipe.set_progress_bar_config(disable=True)
    getattr(pipe, way)(device="cuda" if torch.cuda.is_available() else "cpu")
    expected = draw(ours[family], output_type="pt")
    for _ in range(2):
        assert distance(draw(pipe, output_type="pt").cpu(), expected) < 1e-4
    change = {"output_type": "pt", "image": expected, "strength": 0.5}
    assert distance(draw(pipe, **change).cpu(), draw(ours[family], **change)) < 1e-4


def test_stages_save_and_decode_by_tiles(folders, ours, tmp_path):
    pipe = Pipeline.from_pretrained(folders["lumina_next"], stages=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    for name in ("transformer", "vae", "text_encoder"):
        assert list((tmp_path / name).glob("*.safetensors"))
    pipe.enable_vae_tiling()
    pipe.enable_vae_slicing()
    with pipe.stage("vae") as vae:
        assert vae.use_tiling and vae.use_slicing


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family, dtype, folders, ours):
    """Nearer to float32 than diffusers', which keeps the latents of two families in 16 bits."""
    pipe = Pipeline.from_pretrained(folders[family], torch_dtype=dtype)
    other = diffusers.DiffusionPipeline.from_pretrained(folders[family]).to(dtype)
    noise = torch.randn(2, pipe.vae.config.latent_channels, 8, 8, generator=generator())
    change = {"prompt": ["a red apple", "b"], "latents": noise}
    expected, errors = draw(ours[family], **change), []
    for each in (pipe, other):
        each.set_progress_bar_config(disable=True)
        for name in ("text_encoder", "transformer", "vae"):
            assert getattr(each, name).dtype == dtype
        keeps = each is pipe or family == "z_image"
        result = draw(each, **{**change, "latents": noise if keeps else noise.to(dtype)})
        assert result.dtype == (torch.float32 if family == "z_image" else dtype)
        errors.append((result.float() - expected).square().mean().sqrt().item())
    assert 0 < errors[0] < 1.1 * errors[1]
    assert draw(pipe, output_type="np").dtype == "float32"


def test_a_network_in_a_wrapper(folders, ours, tmp_path):
    pipe = Pipeline.from_pretrained(folders["lumina2"])
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert distance(draw(pipe), draw(ours["lumina2"])) < 1e-5
    pipe.save_pretrained(tmp_path)
    saved = Pipeline.from_pretrained(tmp_path).transformer.state_dict()
    expected = ours["lumina2"].transformer.state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in saved.items())


def test_the_backend_of_the_network(folders, ours):
    pipe = Pipeline.from_pretrained(folders["lumina_next"], backend="torch")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.backend == "torch" and ours["lumina_next"].transformer.backend is None
    assert distance(draw(pipe), draw(ours["lumina_next"])) < 1e-4


def test_a_language_model_with_its_head(folders, ours, tmp_path):
    """Released as a GemmaForCausalLM: its body is read."""
    whole = transformers.GemmaForCausalLM(ours["lumina_next"].text_encoder.config)
    whole.model.load_state_dict(ours["lumina_next"].text_encoder.state_dict())
    whole.save_pretrained(tmp_path)
    pipe = Pipeline.from_pretrained(folders["lumina_next"], text_encoder=tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe), draw(ours["lumina_next"]))
    given = Pipeline.from_pretrained(folders["lumina_next"], text_encoder=whole)
    given.set_progress_bar_config(disable=True)
    assert torch.equal(draw(given), draw(ours["lumina_next"]))


def test_other_language_models(folders, ours):
    """Any decoder of the right width: LLaMA here."""
    config = transformers.LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    llama = transformers.LlamaModel(config).eval()
    pipe = Pipeline.from_pretrained(folders["lumina_next"], text_encoder=llama)
    pipe.set_progress_bar_config(disable=True)
    assert distance(draw(pipe), draw(ours["lumina_next"])) > 1e-3


def test_places_of_the_parts(folders, ours):
    folder = folders["lumina_next"]
    for places in ("cpu", torch.device("cpu"), {"text_encoder": "auto", "vae": {"": "cpu"}}):
        pipe = Pipeline.from_pretrained(folder, device_map=places)
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(draw(pipe), draw(ours["lumina_next"]))


def test_adapters_at_a_scale(folders):
    import peft

    pipe = Pipeline.from_pretrained(folders["lumina2"])
    pipe.set_progress_bar_config(disable=True)
    without = draw(pipe)
    config = peft.LoraConfig(
        r=4, target_modules=r"layers\..*\.(w1|w2)", init_lora_weights=False, lora_alpha=16
    )
    pipe.transformer = peft.get_peft_model(pipe.transformer, config)
    whole, half, none = (
        draw(pipe, **({} if s is None else {"attention_kwargs": {"scale": s}}))
        for s in (None, 0.5, 0.0)
    )
    assert torch.equal(none, without) and distance(whole, without) > 1e-3
    assert distance(half, without) > 1e-3 and distance(half, whole) > 1e-3
    assert torch.equal(draw(pipe), whole)  # the scale is put back


@pytest.mark.parametrize("shift", (1.0, 3.0, 6.0))
@pytest.mark.parametrize("steps", (1, 4, 5, 10, 20))
def test_which_steps_are_guided(shift, steps):
    """By diffusers' rules, on the floats that they are made of."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = np.linspace(1, 1 / steps, steps).tolist()
    grid = time_grid(scheduler, steps, sigmas, None, None)
    times = ((1000 - scheduler.timesteps.float()) / 1000).tolist()
    for i in range(21):
        for until, guided in (
            (z_image._until(grid, i / 20), [not t > i / 20 for t in times]),
            (lumina2._until(grid, i / 20), [(n + 1) / steps <= i / 20 for n in range(steps)]),
        ):
            rule = lumina.Guidance(4.0, until=until)
            assert [rule.acts_at(t) for t in grid[:-1].tolist()] == guided, i


def test_a_truncation_at_a_time_of_the_grid():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    grid = time_grid(scheduler, 5, [1, 0.8, 0.6, 0.4, 0.2], None, None)
    assert z_image._until(grid, 0.2) == grid[1]  # float32(0.2) is above 0.2
