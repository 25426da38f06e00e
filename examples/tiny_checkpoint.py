"""A checkpoint folder of random weights, in diffusers' form and in seconds: for tests and for a try.

    python examples/tiny_checkpoint.py lumina2 /tmp/tiny
    python -c "import lumina; lumina.Pipeline.from_pretrained('/tmp/tiny')('a red apple').images[0].show()"

It has every part of the released checkpoints (tokenizer, text encoder, transformer, VAE, scheduler),
each of the released class, and none of their sizes. The pictures are noise.
"""  # noqa: E501

import argparse
import json
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

TEXT = """A red apple on a wooden table, in the morning light. Two cats sleep under an old tree.
You are an assistant designed to generate superior images with the superior degree of image-text
alignment based on textual prompts or user prompts. <Prompt Start> a painting of a house
Ein Haus am Meer, Ölgemälde. Une pomme rouge sur la table. Красное яблоко на столе.
桌子上的红苹果。窗边的猫。 海の見える家。 나무 아래 고양이.
تفاحة حمراء على الطاولة. תפוח אדום על השולחן. 🍎🐱🏠🌊"""

CHAT = (  # as Qwen 3's: thinking is shown to be off by an empty thought
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)

WIDTH = 32  # of the text encoder
DECODER = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}


def write(family: str, folder: str | Path, seed: int = 0) -> Path:
    """Write the folder of a pipeline and return its path.

    family: "lumina_next", "lumina2" or "z_image".

    Raises:
        ValueError: another family; a folder that has something in it.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    folder, pipeline = Path(folder), FAMILIES[family]
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} must be new or empty, or old files would stay in it")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = pipeline["parts"]()
        for part in parts.values():
            if isinstance(part, nn.Module):
                randomise(part)
            # Small shards, so that the folder has an index, as the released ones.
            sharded = {"max_shard_size": "400KB"} if isinstance(part, nn.Module) else {}
            name = next(name for name, value in parts.items() if value is part)
            part.save_pretrained(folder / name, **sharded)
    libraries = {name: type(part).__module__.split(".")[0] for name, part in parts.items()}
    classes = {name: [libraries[name], type(part).__name__] for name, part in parts.items()}
    index = {"_class_name": pipeline["class"], "_diffusers_version": diffusers.__version__}
    (folder / "model_index.json").write_text(json.dumps({**index, **classes}, indent=2) + "\n")
    return folder


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Random numbers everywhere, also where training starts from 0, or a picture shows no text."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif name.endswith("weight"):
            parameter.normal_(mean=0 if "Gemma" in type(module).__name__ else 1, std=0.1)
        else:
            parameter.normal_(std=0.1)
    for layer in getattr(module, "layers", ()):
        if hasattr(layer, "attn2"):  # of Lumina-Next, where one query sees the picture and the text
            for name in ("to_q", "norm_q"):
                same = getattr(layer.attn1, name).state_dict()
                getattr(layer.attn2, name).load_state_dict(same)
    if isinstance(module, diffusers.AutoencoderKL):  # latents as large as noise, as in the released
        z = module.encode(torch.rand(1, 3, 64, 64) * 2 - 1).latent_dist.mode()
        means = module.quant_conv.weight[: z.shape[1]]
        means /= z.std() * module.config.scaling_factor


def tokenizer(special: dict[str, str], first: str | None = None, chat: str | None = None):
    """Byte-level pairs, so that every text in Unicode survives, trained on a few lines."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(dict.fromkeys([*special.values(), "<|im_start|>", "<|im_end|>"])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(TEXT.splitlines(), trainer)
    if first is not None:
        pieces.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, pieces.token_to_id(first))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, chat_template=chat, padding_side="left", **special
    )


def gemma_tokenizer():
    special = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}
    return tokenizer({f"{name}_token": text for name, text in special.items()}, first="<bos>")


def qwen_tokenizer():
    return tokenizer({"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, chat=CHAT)


def vae(channels: int, **scale):
    return diffusers.AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8, 8, 8, 8),  # three halvings: 8 pixels to a latent
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=64,
        **scale,
    )


def lumina_next() -> dict:
    words = gemma_tokenizer()
    return {
        "tokenizer": words,
        "text_encoder": transformers.GemmaModel(
            transformers.GemmaConfig(vocab_size=len(words), **DECODER, pad_token_id=0)
        ),
        "transformer": diffusers.LuminaNextDiT2DModel(
            sample_size=8, hidden_size=64, num_layers=2, num_attention_heads=4, num_kv_heads=2,
            multiple_of=32, cross_attention_dim=WIDTH,
        ),
        "vae": vae(4, scaling_factor=0.13025),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }  # fmt: skip


def lumina2() -> dict:
    words = gemma_tokenizer()
    return {
        "tokenizer": words,
        "text_encoder": transformers.Gemma2Model(
            transformers.Gemma2Config(
                vocab_size=len(words), **DECODER, query_pre_attn_scalar=8, pad_token_id=0
            )
        ),
        "transformer": diffusers.Lumina2Transformer2DModel(
            sample_size=8, hidden_size=72, num_layers=2, num_refiner_layers=1,
            num_attention_heads=3, num_kv_heads=1, multiple_of=32, axes_dim_rope=(8, 8, 8),
            cap_feat_dim=WIDTH,
        ),
        "vae": vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
    }  # fmt: skip


def z_image() -> dict:
    words = qwen_tokenizer()
    return {
        "tokenizer": words,
        "text_encoder": transformers.Qwen3Model(
            transformers.Qwen3Config(vocab_size=len(words), **DECODER)
        ),
        "transformer": diffusers.ZImageTransformer2DModel(
            dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
            axes_dims=[8, 12, 12],
        ),
        "vae": vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }  # fmt: skip


FAMILIES = {
    "lumina_next": {"class": "LuminaPipeline", "parts": lumina_next},
    "lumina2": {"class": "Lumina2Pipeline", "parts": lumina2},
    "z_image": {"class": "ZImagePipeline", "parts": z_image},
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write(arguments.family, arguments.folder, arguments.seed))
