"""Attacks: an `init` and a `step`, pure functions of one trial. Only `trials.py` loops."""
