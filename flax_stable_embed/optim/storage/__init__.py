"""How a moment is stored, and who decides."""
