"""Tables and figure of what updates leak, for docs/results.md: a file for each question."""
