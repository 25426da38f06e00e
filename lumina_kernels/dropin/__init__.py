"""One pass over a captured graph, which puts the ops into any diffusion transformer and knows none."""

from lumina_kernels.dropin.capture import capture as capture
from lumina_kernels.dropin.fuse import fuse as fuse
from lumina_kernels.dropin.report import Report as Report
