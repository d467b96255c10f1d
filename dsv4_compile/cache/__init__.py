"""Compiled kernels and tuning records on disk: built once, shared between processes and machines, checked at every load."""
