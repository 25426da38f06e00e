"""Fused operations for diffusion transformers: plain PyTorch that defines them, and kernels in
Triton, CUDA C++ and, for the CPU, C++.

Alphabet of the shapes: `B` batch, `L` image tokens, `T` text tokens, `D` width, `H` query heads,
`G` key/value heads, `K` head_dim, `F` FFN width. Heads are `(B, L, H, K)`, without transposes.

Every op ends with `backend=None`: a name takes that implementation or raises, None takes
`LUMINA_KERNELS_BACKEND` where it is set and the best one available where it is not
(`lumina_kernels/backend.py`). An op's definition is `<op>_ref` in `lumina_kernels/ops/<op>.py`.
"""

from lumina_kernels.merge_attention import merge_attention as merge_attention
from lumina_kernels.ops.context_drop import context_drop as context_drop
from lumina_kernels.ops.gate_residual_norm import gate_residual_norm as gate_residual_norm
from lumina_kernels.ops.gelu import gelu as gelu
from lumina_kernels.ops.gqa_attention import gqa_attention as gqa_attention
from lumina_kernels.ops.guided_step import guided_step as guided_step
from lumina_kernels.ops.norm_modulate import norm_modulate as norm_modulate
from lumina_kernels.ops.qk_norm_rope3d import qk_norm_rope3d as qk_norm_rope3d
from lumina_kernels.ops.qk_norm_rope3d_pool import qk_norm_rope3d_pool as qk_norm_rope3d_pool
from lumina_kernels.ops.qk_norm_rope_table import qk_norm_rope_table as qk_norm_rope_table
from lumina_kernels.ops.rope3d import rope3d as rope3d
from lumina_kernels.ops.rope_table import rope_table as rope_table
from lumina_kernels.ops.sandwich_norm import sandwich_norm as sandwich_norm
from lumina_kernels.ops.sandwich_norm_chain import sandwich_norm_chain as sandwich_norm_chain
from lumina_kernels.ops.swiglu import swiglu as swiglu
from lumina_kernels.patching import patch as patch
from lumina_kernels.patching import unpatch as unpatch

__version__ = "0.1.0"
