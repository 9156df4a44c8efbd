"""GPUs: Triton kernels, a paged cache in torch, decode steps as CUDA graphs."""
