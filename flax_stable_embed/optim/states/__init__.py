"""Questions to ask of a whole state: describe, abstract_state, convert_state."""
