"""Comparisons that are measured, not tested: run one with `make bench-NAME`."""
