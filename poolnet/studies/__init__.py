"""Work with many runs: sweep, select, compare and report."""
