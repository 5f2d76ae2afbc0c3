"""Runs an update rule over a pytree of parameters, whatever their storage, and turns it into an optax transform."""
