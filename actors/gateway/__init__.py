"""HTTP: the OpenAI-compatible API and the management API."""
