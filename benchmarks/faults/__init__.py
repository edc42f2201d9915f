"""A running service under load while its processes are killed and stopped: see `__main__`."""
