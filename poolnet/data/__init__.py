"""Data sets: made, opened, checked."""
