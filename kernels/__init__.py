"""The scans over interface Jacobians and a soft-label cross entropy: references, Triton kernels, operators."""
