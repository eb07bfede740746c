"""Penstock beside the servers that its user could pick instead: the same checkpoint, the same load, in one run."""
