"""Compute buffers to the byte: the graph that llama.cpp would reserve is drawn up, split and packed as ggml does it."""
