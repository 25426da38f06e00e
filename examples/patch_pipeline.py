"""Put the fused ops into a model of diffusers, see what they took over, and time it.

python examples/patch_pipeline.py: a small random transformer, nothing is downloaded.
python examples/patch_pipeline.py PIPELINE "a prompt": a folder, or a name that diffusers loads.
"""

import sys
import time

import diffusers
import torch

from lumina_kernels import patch, unpatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_transformer():
    """A small Lumina-Image 2.0, and one step of it."""
    torch.manual_seed(0)
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=64, in_channels=4, hidden_size=384, num_layers=4, num_refiner_layers=1,
        num_attention_heads=4, num_kv_heads=2, cap_feat_dim=64,
    )  # fmt: skip
    model = model.to(DEVICE, torch.bfloat16).eval()
    caption = torch.randn(2, 32, 64)
    mask = torch.arange(32) < torch.tensor([[32], [9]])  # two captions, one shorter
    inputs = torch.randn(2, 4, 32, 32), torch.rand(2), caption
    latents, t, caption = (x.to(DEVICE, torch.bfloat16) for x in inputs)
    return model, lambda: model(latents, t, caption, mask.to(DEVICE)).sample


def pipeline(name: str, prompt: str):
    """A pipeline, and a run of it that ends with latents."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(name, torch_dtype=torch.bfloat16)
    pipe.to(DEVICE)

    def draw():
        seed = torch.Generator("cpu").manual_seed(0)
        return pipe(prompt, num_inference_steps=8, generator=seed, output_type="latent").images

    return pipe, draw


@torch.no_grad()
def timed(run, repeats: int = 5):
    """The result and the fastest of some runs, in seconds, after one that does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return out, min(seconds)


if __name__ == "__main__":
    model, run = pipeline(*sys.argv[1:]) if len(sys.argv) == 3 else random_transformer()
    eager, before = timed(run)
    report = patch(model)
    patched, after = timed(run)
    print(report)  # one line for each kind of site: the op that runs there now, or why none does
    left = sorted({row["reason"] for row in report.rows() if row["op"] is None})
    print(f"{report.fused} calls of ops so far; left as it was: {', '.join(left) or 'nothing'}")
    change = (patched - eager).float().norm() / eager.float().norm()
    print(f"eager {before:.3f} s, patched {after:.3f} s: {before / after:.2f} times as fast")
    print(f"relative change of the result {change:.1e}")  # of bfloat16's rounding
    unpatch(model)  # and all is as it was
