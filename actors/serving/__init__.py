"""One loaded model: the llama.cpp engine and the runner actor around it."""
