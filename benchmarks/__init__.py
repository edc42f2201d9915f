"""Measurements, each as a ratio of two things taken side by side in one run. `python -m benchmarks` runs them all."""
