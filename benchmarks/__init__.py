"""What the 8-bit optimizers cost on this machine, beside fp32 and beside other libraries: `python -m benchmarks`."""
