"""Z-Image in plain PyTorch: what `lumina.ZImage` and its kernels are tested against.

No kernels, no tricks; runs in float64. After "Z-Image" (arXiv 2511.22699) and its released model,
whose blocks are those of Lumina-Image 2.0; parameters carry ComfyUI's names, in which q, k and v
are one matrix. Every image runs alone, with the tokens of its text and no others.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lumina.models.lumina2 import reference
from lumina.models.lumina2.reference import Block, patches
from lumina.models.next_dit.reference import TimestepEmbedder


class ZImage(reference.Lumina2):
    """The velocity network; `forward` takes and returns what `lumina.ZImage.forward` does."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.t_embedder = TimestepEmbedder(config.cond_dim, 1024)
        self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim))

    def block(self):
        linear = nn.Linear(self.config.cond_dim, 4 * self.config.dim)
        return Block(self.config, nn.Sequential(linear))

    def one(self, x, t, feats, rope_scaling=None, base_seqlen=None, context_drop=None):
        image, grid = patches(x, self.config.patch_size)
        n = -(-len(feats) // 32) * 32  # the text is filled up to a multiple of 32 tokens
        text_at = torch.tensor([(1 + i, 0, 0) for i in range(n)]).reshape(n, 3)
        h, w = grid
        image_at = torch.tensor([(1 + n, r, c) for r in range(h) for c in range(w)])
        more = -len(image) % 32  # so is the image, behind its tokens
        pads = self.x_pad_token.expand(more, -1), torch.zeros(more, 3, dtype=torch.int64)
        c = self.t_embedder(t.to(x.dtype) * self.config.t_scale)
        options = rope_scaling, base_seqlen, context_drop
        return self.velocity(
            x, t, grid, (image, image_at), (feats, text_at), c, F.silu(c), options, pads
        )

    def embed_text(self, feats):
        more = -len(feats) % 32
        return torch.cat([self.cap_embedder(feats), self.cap_pad_token.expand(more, -1)])
