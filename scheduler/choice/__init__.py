"""Chooses places for models, and the replicas that are evicted for them. Holds no state."""
