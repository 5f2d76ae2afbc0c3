"""Decides how the moments of each parameter are stored, by rules, and stores them. `plan.py` makes the decision."""
