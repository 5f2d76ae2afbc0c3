"""8-bit optimizers as optax transforms. README.md here follows one parameter from rule to storage to step."""
