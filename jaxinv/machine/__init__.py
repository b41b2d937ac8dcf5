"""The process: its devices, precision and caches; workers on other machines."""
