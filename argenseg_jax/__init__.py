"""ARGenSeg in JAX: segmentation by generating the codes of a mask image."""
