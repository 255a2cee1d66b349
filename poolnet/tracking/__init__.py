"""MLflow: everything that is sent to it or read back."""
