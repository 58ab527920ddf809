"""Benchmarks: one file a claim, each run as `python -m benchmarks.NAME [--quick] [--json FILE]` (`make bench`)."""
