"""What the 8-bit optimizers cost on this machine, `python -m benchmarks`, and how they train, `.quality`."""
