"""What the cluster holds: devices, host memory, cores, and the books kept on them."""
