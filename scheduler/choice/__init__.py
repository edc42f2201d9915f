"""What to do about it: candidate layouts, the place for them, and who makes room."""
