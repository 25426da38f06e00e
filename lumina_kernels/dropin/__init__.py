"""One pass over a captured graph, which puts the ops into any diffusion transformer."""
