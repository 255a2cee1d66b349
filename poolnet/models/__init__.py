"""Models in use: load, score, promote, predict."""
