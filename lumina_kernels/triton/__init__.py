"""One file per op: its Triton kernels and their launchers, imported when they first run."""
