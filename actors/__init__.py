"""Acts. Ray actors that measure, load, serve and carry out what the scheduler decides."""
