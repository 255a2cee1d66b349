"""Make, open and check data sets."""
