"""A small caption encoder that reads bytes: it works in every language and needs no download."""

from __future__ import annotations

import unicodedata
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_BYTES = 127  # with the start symbol 128, so at most 32 features
REGISTERS = 8
START, PAD = 256, 257
NGRAMS = (3, 6)  # one and two characters of the scripts that take three bytes each
BUCKETS = 4096


def spelled(text: str) -> str:
    """A text as the encoder reads it: in NFC, case-folded, runs of blanks as one."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def to_bytes(captions: list[str]) -> Tensor:
    """Return (B, N) int64 symbols, N a multiple of 4: start, UTF-8 bytes of the text, padding.

    The text is normalised to NFC and case-folded, runs of blanks become one, and it is cut off
    after `MAX_BYTES` bytes, with a warning. The empty caption, the null prompt of classifier-free
    guidance, is the start symbol alone.

    Raises:
        TypeError: captions is a single text instead of a list.
    """
    if isinstance(captions, str):  # a list of letters, to Python
        raise TypeError(f"captions must be a list of texts, got {captions!r}")
    texts = [spelled(caption).encode() for caption in captions]
    longest = max(texts, key=len, default=b"")
    if len(longest) > MAX_BYTES:
        warnings.warn(
            f"a caption is read up to {MAX_BYTES} bytes of UTF-8, the rest is ignored; "
            f"{longest[:32].decode(errors='ignore') + '...'!r} has {len(longest)}",
            stacklevel=2,
        )
    rows = [[START, *text[:MAX_BYTES]] for text in texts]
    length = -(-max(map(len, rows), default=1) // 4) * 4
    rows = [row + [PAD] * (length - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.long).reshape(-1, length)


class CaptionEncoder(nn.Module):
    """Captions to features (B, T, dim) and mask (B, T), as a language model does in Lumina-Next.

    Each byte is embedded together with hashes of the 3 and the 6 bytes that end there (hashed
    n-grams, as in the Byte Latent Transformer, arXiv 2412.09871, section 3.2.1); two strided
    convolutions make one feature of four bytes, and a pre-norm transformer layer lets the features
    see each other. A caption's features do not depend on its batch.

    Learned features that start out the same for every caption come first (registers, arXiv
    2309.16588). A Next-DiT learns absolute positions only in its text branch, where rotated queries
    meet keys that are not rotated; the registers provide such keys even for the empty caption.

    Args:
        dim: width of the features, `cap_feat_dim` of the model.
        width: width of the byte embeddings.
        heads: attention heads of the transformer layer.
    """

    def __init__(self, dim: int = 256, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.dim, self.width, self.heads = dim, width, heads
        self.byte = nn.Embedding(258, width)
        self.ngrams = nn.ModuleList(nn.Embedding(BUCKETS, width) for _ in NGRAMS)
        self.position = nn.Parameter(torch.empty((MAX_BYTES + 1) // 4, dim))
        self.registers = nn.Parameter(torch.empty(REGISTERS, dim))
        self.conv1 = nn.Conv1d(width, dim, 4, stride=2, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 4, stride=2, padding=1)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        for table in (self.byte, *self.ngrams):
            nn.init.normal_(table.weight, std=0.5)
        nn.init.normal_(self.position, std=0.02)
        nn.init.normal_(self.registers, std=0.5)

    def forward(self, captions: list[str] | Tensor) -> tuple[Tensor, Tensor]:
        """Encode texts, or what `to_bytes` made of them.

        Returns:
            features (B, T, dim) in the dtype of the parameters; mask (B, T) bool, True for the
            registers and where there is text. T is `REGISTERS` and a quarter of the symbols.
        """
        symbols = captions if isinstance(captions, Tensor) else to_bytes(captions)
        symbols = symbols.to(self.position.device)
        valid = symbols != PAD  # (B, N)
        x = self.byte(symbols)
        for n, table in zip(NGRAMS, self.ngrams, strict=True):
            x = x + table(_hash(symbols, n))
        # Zeros beyond the end, after every layer: no convolution must see where the padding ends.
        x = (x * valid[..., None]).transpose(1, 2)  # (B, width, N)
        valid = valid.unflatten(1, (-1, 2)).any(-1)
        x = F.silu(self.conv1(x)) * valid[:, None]
        valid = valid.unflatten(1, (-1, 2)).any(-1)
        x = self.conv2(x).transpose(1, 2) + self.position[: valid.shape[1]]  # (B, T, dim)
        x = torch.cat([self.registers.expand(len(x), -1, -1), x], dim=1)
        valid = F.pad(valid, (REGISTERS, 0), value=True)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
        x = x + self.proj(h.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x, valid


def _hash(symbols: Tensor, n: int) -> Tensor:
    """Bucket of the `n` symbols that end at each position (fewer at the start)."""
    bucket = torch.zeros_like(symbols)
    for back in range(n):
        bucket = (bucket * 263 + F.pad(symbols, (back, 0))[:, : symbols.shape[1]] + 1) % 2147483629
    return (bucket * 40503 >> 7) % BUCKETS
