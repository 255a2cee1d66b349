"""Statistics of comparisons and scores: arrays in, numbers out."""
