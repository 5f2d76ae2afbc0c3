"""Tables and pictures of the documentation, made from the files in `results/`."""
