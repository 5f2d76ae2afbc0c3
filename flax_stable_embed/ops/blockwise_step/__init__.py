"""One optimizer step on one array with 8-bit moments."""
