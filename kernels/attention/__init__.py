"""Attention over the paged KV cache: definition.py says what it is, triton.py runs it on a GPU."""
