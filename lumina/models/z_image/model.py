"""Z-Image (arXiv 2511.22699) on the fused ops of lumina_kernels.

The parameters have the names of the files of ComfyUI, in which q, k and v are one matrix, and of
`reference.ZImage`, which defines in plain PyTorch what this file computes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.models.parts.joint import JointCaption
from lumina.models.parts.joint_model import JointTransformer, Padding
from lumina.models.parts.patches import Tokens, filled
from lumina.models.parts.timestep import TimestepEmbedder
from lumina.models.z_image.config import ZImageConfig

MULTIPLE = 32  # text and image are filled up to multiples of so many tokens, with learned ones


class ZImage(JointTransformer):
    """The velocity network of Z-Image.

    Text token i lies at (1 + i, 0, 0), the learned tokens that fill it up go on counting, to n;
    token (r, c) of the image lies at (1 + n, r, c), its own filling at (0, 0, 0).

    Args:
        config: sizes, see `ZImageConfig`.
        backend: of every op: "torch", "triton", "cuda", "cpu"; None takes the best one for the
            tensors' device.
    """

    def __init__(self, config: ZImageConfig, backend: str | None = None) -> None:
        super().__init__(config, TimestepEmbedder(config.cond_dim, 1024), backend)
        self.x_pad_token = nn.Parameter(torch.empty(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.empty(1, config.dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for token in (self.x_pad_token, self.cap_pad_token):
            nn.init.normal_(token, std=0.02)

    def _modulation(self) -> nn.Module:
        return nn.Sequential(nn.Linear(self.config.cond_dim, 4 * self.config.dim))

    def _conditions(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # Never scaled in 16 bits, which would merge neighbouring times.
        t = t.to(torch.promote_types(t.dtype, torch.float32)) * self.config.t_scale
        c = self.t_embedder(t, dtype)
        return c, F.silu(c)

    def _embedded(self, feats: Tensor, mask: Tensor) -> JointCaption:
        more = -mask.shape[1] % MULTIPLE
        mask = F.pad(mask, (0, more))
        text = F.pad(self.cap_embedder(feats), (0, 0, 0, more))
        count = mask.sum(1)  # (B,)
        filling = -count % MULTIPLE
        # The first slots without text take the filling; the rest is no part of the sequence.
        rank = (~mask).cumsum(1) - 1
        filled_up = ~mask & (rank < filling[:, None])
        text = torch.where(filled_up[..., None], self.cap_pad_token.to(text.dtype), text)
        places = 1 + torch.where(mask, mask.cumsum(1) - 1, count[:, None] + rank)
        return JointCaption(text, mask | filled_up, places, 1 + count + filling)

    def _padding(self, tokens: Tokens) -> Padding | None:
        each = [-t * r * c % MULTIPLE for t, r, c in tokens.grids]
        most = max(each)
        # The gradient of a parameter without influence is 0; DDP waits for it in every step.
        if most == 0 and not torch.is_grad_enabled():
            return None
        token = self.x_pad_token.to(tokens.patches.dtype).expand(1, most, -1)
        if all(n == most for n in each):
            return token, None
        attended = torch.arange(most, device=token.device)
        return token, attended < filled(each, token.device)[:, None]
