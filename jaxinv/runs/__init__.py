"""A run folder: blocks of work, their rows, and the files they are in."""
