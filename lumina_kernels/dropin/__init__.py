"""The ops in other people's diffusion transformers: one pass over a graph, which knows no model."""

from lumina_kernels.dropin.doors import compile_backend as compile_backend
from lumina_kernels.dropin.doors import patch as patch
from lumina_kernels.dropin.doors import unpatch as unpatch
from lumina_kernels.dropin.report import Report as Report
