"""Speed and memory, beside references. Never part of the tests."""
