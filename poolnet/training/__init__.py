"""Networks trained and evaluated in memory."""
