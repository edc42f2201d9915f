"""A soak of the core: see `__main__`."""
