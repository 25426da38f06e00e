"""Tensors by their dimensions, in the alphabet of `lumina_kernels`; see `lumina_kernels.kernel_op`.

A letter in brackets names a dimension that may be missing; of two, the last one first.
"""

from typing import Annotated

from torch import Tensor

Rows = Annotated[Tensor, "B L D"]
Vector = Annotated[Tensor, "D"]
Modulation = Annotated[Tensor, "B [L] D"]
RowStatistic = Annotated[Tensor, "B L"]
Statistics = Annotated[Tensor, "S B L"]  # rstd and, of a LayerNorm, the mean
Heads = Annotated[Tensor, "B L H K"]
Positions = Annotated[Tensor, "[B] L A"]
Frequencies = Annotated[Tensor, "[B] P"]
Table = Annotated[Tensor, "[B] L [H] K"]
Windows = Annotated[Tensor, "B W"]
PooledHeads = Annotated[Tensor, "B W H K"]
