"""Decides. Pure Python: facts in, decisions out; no Ray, no llama.cpp, no clock, no threads."""
