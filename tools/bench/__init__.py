"""Benchmarks that anyone can rerun; each compares with its peers in one run."""
