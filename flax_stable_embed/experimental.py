"""Functions whose names and signatures may still change."""

from .optim.step_in_backward import step_in_backward as step_in_backward
