"""Next-DiT, the network of Lumina-Next (arXiv 2406.18583)."""
