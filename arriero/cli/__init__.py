"""The `arriero` command."""
