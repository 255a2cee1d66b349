"""The tags of MLflow runs, which poolnet and users search.

They are contracts: scripts and old stores use them. Params are the fields of `TrainConfig`.
"""

# of a training
RUN = "poolnet.run"  # the name of its record
SWEEP = "poolnet.sweep"  # the name of the sweep that it is part of
DATA_SHA256 = "poolnet.data_sha256"
DEVICE = "poolnet.device"
GIT_DIRTY = "poolnet.git_dirty"
REPRODUCES = "poolnet.reproduces"  # the name of the run that it repeats
REPRODUCED_BY = "poolnet.reproduced_by"  # the id of the run that repeated it
REPRODUCTION = "poolnet.reproduction"  # whether the repetition agrees

# of a result
STUDY = "poolnet.study"  # the name of a sweep, on its own run
COMPARISON = "poolnet.comparison"  # the verdict
EVALUATION = "poolnet.evaluation"  # whether the scores agree with the recorded ones
WEIGHTS = "poolnet.weights"  # pooling, checksum of the file and of the data, of what was registered
PROMOTION = "poolnet.promotion"  # the kind of decision

# MLflow's own
NOTE = "mlflow.note.content"  # Markdown, on the run's page
TITLE = "mlflow.runName"
USER = "mlflow.user"
PARENT = "mlflow.parentRunId"
COMMIT = "mlflow.source.git.commit"
CONTEXT = "mlflow.data.context"  # of an input: the name of the split
MODEL_VERSIONS = "mlflow.modelVersions"  # of a model


def source(command: str, user: str) -> dict[str, str]:
    """Return the tags for who made a run, with which command."""
    return {"mlflow.source.name": f"poolnet {command}", "mlflow.source.type": "LOCAL", USER: user}
