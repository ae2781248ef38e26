"""Benchmarks: what the flow, the memory bank and the first picture cost. See docs/benchmarks.md."""
