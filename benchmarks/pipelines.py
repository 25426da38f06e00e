"""Our pipelines beside diffusers': python -m benchmarks.pipelines --out DIR

Text to image with Lumina-Next, Lumina-Image 2.0 and Z-Image, of random weights: width 1152, 4
layers and the released shapes of head and text, so that a step takes seconds and not minutes. Both
sides have the same weights, embeddings of a prompt and noise, and guide. A call of ours and one of
theirs alternate; times are medians, of a step without the first one. Peak memory is that of a
process of its own that loads the folder and draws one picture, all parts included. Encoding is
`encode_prompt` of a prompt and a negative prompt, with a text encoder of width 512 and 8 layers.

DIR gets pipelines.json and pipelines.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

FAMILIES = {
    "Lumina-Next": ("lumina_next", "LuminaPipeline", "LuminaNextDiT2DModel", dict(
        hidden_size=1152, num_layers=4, num_attention_heads=16, num_kv_heads=4,
        cross_attention_dim=2048,
    )),
    "Lumina-Image 2.0": ("lumina2", "Lumina2Pipeline", "Lumina2Transformer2DModel", dict(
        hidden_size=1152, num_layers=4, num_attention_heads=12, num_kv_heads=4, cap_feat_dim=2304,
    )),
    "Z-Image": ("z_image", "ZImagePipeline", "ZImageTransformer2DModel", dict(
        dim=1152, n_layers=4, n_heads=9, n_kv_heads=9, cap_feat_dim=2560,
    )),
}  # fmt: skip
TOKENS = {"prompt_embeds": 64, "negative_prompt_embeds": 8}  # of text
ENCODER = dict(
    hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64,
)  # fmt: skip
SIDES = "ours", "diffusers"
NO_TEXT = {"text_encoder": None}  # the folder's is narrower than the features of the benchmark
PROMPTS = "A red apple on a wooden table, in the morning light", "low quality"
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.pipelines")
    parser.add_argument("--out", type=Path, help="folder to write to")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="of a picture")
    parser.add_argument("--steps", type=int, default=3, help="of a call (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of each (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        print(peak(*args.child))
        return 0
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    rows = []
    for name in args.families:
        with tempfile.TemporaryDirectory() as temporary:
            encoding = measure_encoding(name, Path(temporary) / "tiny", args)
            folder = write_folder(name, Path(temporary) / "pipeline", getattr(torch, args.dtype))
            for tokens in args.tokens:
                rows.append(measure(name, folder, tokens, args) | encoding)
                print(line(rows[-1]), flush=True)
    if args.out:
        from benchmarks.harness.machine import describe

        args.out.mkdir(parents=True, exist_ok=True)
        found = {"machine": describe("cpu"), "dtype": args.dtype, "rows": rows}
        (args.out / "pipelines.json").write_text(json.dumps(found, indent=2) + "\n")
        (args.out / "pipelines.md").write_text("\n".join([HEAD, *map(line, rows)]) + "\n")
    return 0


def measure_encoding(name: str, folder: Path, args) -> dict:
    import tiny_checkpoint

    tiny_checkpoint.write(FAMILIES[name][0], folder)
    pipes = {side: load(side, name, folder, getattr(torch, args.dtype)) for side in SIDES}
    given = {"prompt": PROMPTS[0], "negative_prompt": PROMPTS[1]}
    if name == "Lumina-Next":
        given["do_classifier_free_guidance"] = True
    encoder = pipes["diffusers"].text_encoder
    torch.manual_seed(0)
    config = {**encoder.config.to_dict(), **ENCODER, "layer_types": None}
    encoder = type(encoder)(type(encoder.config)(**config))
    for pipe in pipes.values():
        pipe.text_encoder = encoder.to(pipe.dtype).eval()
    times = {side: [] for side in SIDES}
    for _ in range(20):
        for side, pipe in pipes.items():
            start = time.perf_counter()
            with torch.no_grad():
                pipe.encode_prompt(**given)
            times[side].append(time.perf_counter() - start)
    return {f"{side}, s to encode": statistics.median(each) for side, each in times.items()}


def write_folder(name: str, folder: Path, dtype: torch.dtype) -> Path:
    """A folder of diffusers with a transformer of the benchmark's size and tiny other parts."""
    import diffusers
    import tiny_checkpoint

    family, _, kind, sizes = FAMILIES[name]
    tiny_checkpoint.write(family, folder)
    torch.manual_seed(0)
    network = torch.nn.Module.to(getattr(diffusers, kind)(**sizes), dtype)
    tiny_checkpoint.randomise(network)
    for file in (folder / "transformer").iterdir():
        file.unlink()
    network.save_pretrained(folder / "transformer")
    return folder


def load(side: str, name: str, folder: Path, dtype: torch.dtype, **parts):
    """Our pipeline, or that of diffusers, with these parts in place of the folder's."""
    _, pipeline, _, _ = FAMILIES[name]
    if side == "ours":
        from lumina.pipelines import Pipeline

        pipe = Pipeline.from_pretrained(folder, dtype=dtype, **parts)
    else:
        import diffusers

        pipe = getattr(diffusers, pipeline).from_pretrained(folder, dtype=dtype, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(name: str, tokens: int, dtype: torch.dtype) -> dict:
    """Arguments of a call: a size of so many tokens, and features in place of prompts."""
    sizes = FAMILIES[name][3]
    width = sizes.get("cap_feat_dim") or sizes["cross_attention_dim"]
    side = 16 * int(tokens**0.5)
    generator = torch.Generator().manual_seed(1)
    feats = {
        key: torch.randn(1, length, width, generator=generator).to(dtype)
        for key, length in TOKENS.items()
    }
    if name == "Z-Image":
        feats = {key: [value[0]] for key, value in feats.items()}
    else:  # diffusers takes both of one length
        for key, length in TOKENS.items():
            mask = torch.zeros(1, max(TOKENS.values()), dtype=torch.long)
            mask[:, :length] = 1
            more = max(TOKENS.values()) - length
            feats[key] = torch.nn.functional.pad(feats[key], (0, 0, 0, more))
            feats[key.replace("embeds", "attention_mask")] = mask
    return dict(height=side, width=side, **feats)


def call(pipe, given: dict, steps: int, output_type: str) -> tuple[float, float, object]:
    """Seconds of a step, seconds after the last one, and what came out."""
    times = []

    def on_step_end(pipe, i, t, tensors):
        times.append(time.perf_counter())
        return tensors

    out = pipe(
        **given, num_inference_steps=steps, output_type=output_type,
        generator=torch.Generator().manual_seed(0), callback_on_step_end=on_step_end,
    ).images  # fmt: skip
    after = time.perf_counter() - times[-1]
    return (times[-1] - times[0]) / (steps - 1), after, out


def measure(name: str, folder: Path, tokens: int, args) -> dict:
    dtype = getattr(torch, args.dtype)
    pipes = {side: load(side, name, folder, dtype, **NO_TEXT) for side in SIDES}
    given, found = inputs(name, tokens, dtype), {}
    outs = {side: call(pipe, given, 2, "latent")[2] for side, pipe in pipes.items()}
    ours, theirs = (z.float() for z in outs.values())
    error = ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()
    steps = {side: [] for side in SIDES}
    decode = {side: [] for side in SIDES}
    for _ in range(args.repeats):
        for side, pipe in pipes.items():
            step, after, _ = call(pipe, given, args.steps, "np")
            steps[side].append(step)
            decode[side].append(after)
    for side in SIDES:
        found[f"{side}, s a step"] = statistics.median(steps[side])
        found[f"{side}, s to decode"] = statistics.median(decode[side])
        found[f"{side}, peak MiB"] = peak_of(side, name, folder, tokens, args)
    return {"family": name, "tokens": tokens, "difference (rms)": error, **found}


def peak_of(side: str, name: str, folder: Path, tokens: int, args) -> float:
    """The peak of memory of a process that draws one picture."""
    arguments = ["--child", side, name, str(folder), str(tokens)]
    arguments += ["--dtype", args.dtype, "--threads", str(args.threads)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.pipelines", *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def peak(side: str, name: str, folder: str, tokens: str) -> float:
    """In this process, in MiB."""
    from lumina.cli.pictures import peak_memory

    dtype = torch.bfloat16
    pipe = load(side, name, Path(folder), dtype, **NO_TEXT)
    call(pipe, inputs(name, int(tokens), dtype), 2, "np")
    return peak_memory() / MIB


HEAD = """\
| pipeline | tokens | a step, s | diffusers, s | times as fast | encoding, s | diffusers, s | \
decoding, s | diffusers, s | peak MiB | diffusers, MiB |
|---|---|---|---|---|---|---|---|---|---|---|"""


def line(row: dict) -> str:
    ours, theirs = row["ours, s a step"], row["diffusers, s a step"]
    cells = [
        row["family"], str(row["tokens"]), f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}",
        *(f"{row[f'{side}, s to encode']:.3f}" for side in SIDES),
        *(f"{row[f'{side}, s to decode']:.2f}" for side in SIDES),
        *(f"{row[f'{side}, peak MiB']:.0f}" for side in SIDES),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
