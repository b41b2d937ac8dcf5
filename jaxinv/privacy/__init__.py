"""Differential privacy: DP-SGD's gradient, and what it is worth."""
