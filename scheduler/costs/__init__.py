"""What a model costs: bytes per device, read from the GGUF header before anything is loaded."""
