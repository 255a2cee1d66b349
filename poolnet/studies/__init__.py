"""Many runs: sweep, select, compare, report."""
