"""Kernels: the same signature everywhere, `kernel(q, k, v, mask, scale, softcap, bias) -> (out,
lse)`.
"""
