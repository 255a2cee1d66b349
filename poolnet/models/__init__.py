"""Score, promote, import, reproduce and use trained models."""
