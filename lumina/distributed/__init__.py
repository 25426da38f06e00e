"""One network on several processes: sequence parallelism and FSDP2 on PyTorch's own engine."""
