"""The graphs of the architectures, one file per family. After src/models/*.cpp of llama.cpp."""
