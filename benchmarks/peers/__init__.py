"""What takes part in the benchmarks, one file a piece of software; each function is a target of the harness."""
