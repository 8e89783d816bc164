"""What a person runs: the command line, the live view, benchmarks. Decides nothing."""
