"""Recurrences: which axis is time, fused kernels as loops, and the matrices that multiply a state."""
