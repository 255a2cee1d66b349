"""poolnet: which pooling layer loses less?

Importing the package imports nothing heavy, so that `poolnet --help` is instant; take what you need from the
modules: `poolnet.data`, `poolnet.model`, `poolnet.train`, `poolnet.tracking`.
"""

import os

# What MLflow reads when it is imported, and only where the user has not decided otherwise.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # `poolnet train` says it, for every store
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # on stderr, where errors are said
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # MLflow's own 7 block for four minutes; we try again
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
