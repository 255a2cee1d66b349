"""Train and evaluate networks in memory."""
