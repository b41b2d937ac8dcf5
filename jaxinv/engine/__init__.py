"""Targets x seeds: what is attacked, by which plan, in one compiled loop."""
