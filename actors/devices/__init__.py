"""The machine as it is: GPUs through NVML, host memory, model files."""
