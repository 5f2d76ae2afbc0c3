"""Functions of the state of an optimizer: report it (`describe`), restore it (`abstract_state`), convert it."""
