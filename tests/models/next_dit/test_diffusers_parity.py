"""lumina.reference against the installed diffusers: the network, and a run of its pipeline."""

import math

import pytest
import torch

from lumina.checkpoints import checkpoint
from lumina.models.next_dit import reference
from lumina.models.next_dit.config import NextDiTConfig
from lumina.models.parts.rope import RopeScaling

diffusers = pytest.importorskip("diffusers")
embeddings = pytest.importorskip("diffusers.models.embeddings")

WIDTH = 32  # of the text features
# Query heads over key/value heads; head_dim 72 is the released model's.
RATIOS = {"1:1": (2, 2, 24), "2:1": (4, 2, 72), "4:1": (4, 1, 16)}
PAIRS = {}  # ratio -> (reference, diffusers), built once


def build(ratio):
    heads, kv_heads, head_dim = RATIOS[ratio]
    return NextDiTConfig(
        dim=heads * head_dim, n_layers=2, n_heads=heads, n_kv_heads=kv_heads, multiple_of=32,
        cap_feat_dim=WIDTH,
    )  # fmt: skip


def randomise(model, seed=0):
    """Random values for every parameter, those that start as 0 or 1 too."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if p.ndim == 2:
            noise /= math.sqrt(p.shape[1])
        elif "norm" in name and name.endswith("weight") or name == "cap_embedder.0.weight":
            noise = 1 + 0.3 * noise
        p.data.copy_(noise)
    return model.eval()


@pytest.fixture(params=RATIOS)
def pair(request, tmp_path_factory):
    """The reference, and diffusers' network with its weights by way of `checkpoint.save`."""
    return make_pair(request.param, tmp_path_factory)


def make_pair(ratio, tmp_path_factory):
    if ratio not in PAIRS:
        ours = randomise(reference.NextDiT(build(ratio)))
        folder = tmp_path_factory.mktemp("diffusers")
        checkpoint.save(ours, folder, format="diffusers")
        theirs, info = diffusers.LuminaNextDiT2DModel.from_pretrained(
            folder, output_loading_info=True
        )
        assert not any(info.values()), info
        PAIRS[ratio] = ours, theirs.eval()
    return PAIRS[ratio]


def inputs(size, batch=2, tokens=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, *size, generator=g)
    t = torch.rand(batch, generator=g)
    text = torch.randn(batch, tokens, WIDTH, generator=g)
    length = torch.tensor([tokens, 3])[:batch]
    return x, t, text, torch.arange(tokens) < length[:, None]


@torch.no_grad()
def assert_parity(pair, x, t, text, mask, *, base_seqlen=None, scaling=None):
    ours, theirs = pair
    factors = {} if scaling is None else {f"{scaling.kind}_factor": scaling.factor}
    table = embeddings.get_2d_rotary_pos_embed_lumina(theirs.head_dim, 24, 24, **factors)
    kwargs = {} if base_seqlen is None else {"base_sequence_length": base_seqlen}
    expected = theirs(
        x, t, text, mask, image_rotary_emb=table, cross_attention_kwargs=kwargs, return_dict=False
    )[0]
    expected = expected.chunk(2, dim=1)[0]  # the half that learn_sigma does not throw away
    out = ours(x, t, text, mask, rope_scaling=scaling, base_seqlen=base_seqlen)
    assert out.shape == x.shape
    error = (out - expected).abs().max() / expected.square().mean().sqrt()
    assert error <= 2e-5
    return out


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (14, 6)])
def test_sizes_and_ragged_captions(pair, size):
    assert_parity(pair, *inputs(size))


@pytest.mark.parametrize("base_seqlen", [4, 30, 4096])
def test_proportional_attention(pair, base_seqlen):
    x, t, text, mask = inputs((6, 10))
    out = assert_parity(pair, x, t, text, mask, base_seqlen=base_seqlen)
    with torch.no_grad():
        assert (out - pair[0](x, t, text, mask)).abs().max() > 1e-3  # it does something


@pytest.mark.parametrize("factor", [0.25, 0.7, 1.5, 4.0])
@pytest.mark.parametrize("kind", ["linear", "ntk"])
def test_scaled_rope(pair, kind, factor):
    x, t, text, mask = inputs((6, 10))
    out = assert_parity(pair, x, t, text, mask, scaling=RopeScaling(kind, factor))
    with torch.no_grad():
        assert (out - pair[0](x, t, text, mask)).abs().max() > 1e-3


def test_epsilons(tmp_path):
    """What every norm sees is so small that its epsilon counts."""
    ours = randomise(reference.NextDiT(build("2:1")))
    small = ("x_embedder", "wq", "wk", "wk_y", "wo", "w2", "attention_norm2", "ffn_norm2")
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name.split(".")[-2:][0] in small:
                p *= 1e-3
    checkpoint.save(ours, tmp_path, format="diffusers")
    theirs = diffusers.LuminaNextDiT2DModel.from_pretrained(tmp_path).eval()
    x, t, text, mask = inputs((6, 4))
    assert_parity((ours, theirs), x, t, 1e-3 * text, mask)


def test_without_qk_norm(tmp_path):
    config = NextDiTConfig(
        dim=48, n_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH, qk_norm=False,
        norm_eps=1e-3, ffn_dim_multiplier=1.3, multiple_of=16,
    )  # fmt: skip
    ours = randomise(reference.NextDiT(config))
    checkpoint.save(ours, tmp_path, format="diffusers")
    theirs = diffusers.LuminaNextDiT2DModel.from_pretrained(tmp_path).eval()
    assert_parity((ours, theirs), *inputs((6, 4)))


# (pixels of training per side, watershed, shift): extrapolation with both rules, and what happens
# to small pictures at the defaults of a 1024 px model.
@pytest.mark.parametrize(
    "train, watershed, shift", [(32, 0.3, 1.0), (64, 1.0, 4.0), (1024, 1.0, 1.0)]
)
def test_pipeline(train, watershed, shift, tmp_path_factory):
    steps, guidance, height, width = 5, 4.0, 64, 96
    ours, theirs = make_pair("2:1", tmp_path_factory)
    x, _, text, mask = inputs((height // 8, width // 8), seed=2)
    _, _, negative, negative_mask = inputs((2, 2), seed=3)
    negative_mask = negative_mask.flip(0)

    pipeline = diffusers.LuminaPipeline(
        transformer=theirs, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=None, text_encoder=None, tokenizer=None,
    )  # fmt: skip
    pipeline.default_image_size = train
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=text, prompt_attention_mask=mask,
        negative_prompt_embeds=negative, negative_prompt_attention_mask=negative_mask,
        latents=x, height=height, width=width, num_inference_steps=steps, guidance_scale=guidance,
        scaling_watershed=watershed, output_type="latent", return_dict=False,
    )[0]  # fmt: skip

    def shifted(sigma):
        return shift * sigma / (1 + (shift - 1) * sigma)

    # diffusers shifts the smallest sigma a second time, and goes from there to 0 in one more step
    sigmas = [shifted(s) for s in torch.linspace(1, shifted(1e-3), steps).tolist()] + [0.0]
    scaling = RopeScaling("watershed", math.sqrt(width * height) / train, watershed=watershed)
    both = torch.cat([text, negative]), torch.cat([mask, negative_mask])
    with torch.no_grad():
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            t = torch.full((4,), 1 - sigma)
            v = ours(
                torch.cat([x, x]), t, *both, rope_scaling=scaling, base_seqlen=(train // 16) ** 2
            )
            cond, uncond = v.chunk(2)
            guided = uncond + guidance * (cond - uncond)
            v = torch.cat([guided[:, :3], cond[:, 3:]], dim=1)  # the released quirk
            x = x + (sigma - following) * v
    assert expected.std() > 1  # the run went somewhere
    assert (x - expected).abs().max() <= 1e-4
