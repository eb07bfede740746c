"""Measuring Penstock and its peers: `penstock bench …`, and scripts that are run by hand."""
