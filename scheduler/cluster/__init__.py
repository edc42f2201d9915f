"""The state of the cluster: devices, host memory, cores, models and replicas, and the books on them."""
