"""Experiments on quality: trainings with each codec and rounding, and errors of the formats."""
