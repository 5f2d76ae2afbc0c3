"""One optimizer step on one array whose moments are stored in blocks."""
