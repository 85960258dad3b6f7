"""Triton kernels and their launchers, one file per op; import it only where Triton is installed."""
