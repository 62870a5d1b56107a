"""Kernels in Triton for NVIDIA GPUs; triton is imported by its modules alone, on demand."""
