"""The scan over interface Jacobians: reference, Triton kernel, and the operators that dispatch between them."""
