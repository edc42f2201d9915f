"""Clusters that are only described: plans for them, and runs of the production core under a virtual clock."""
