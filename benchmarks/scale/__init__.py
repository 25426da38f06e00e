"""Step time and memory on many GPUs, predicted from FLOPs, bytes and rates; docs/scaling.md."""
