"""The tags and metrics of MLflow runs.

They are contracts: poolnet and users search them, scripts and old stores use them. Params are the fields of
`TrainConfig`. MLflow's interface makes a section of the metrics with the same text before a slash. Those without a
slash, loss and accuracy of train, val and test, are a section of their own.
"""

from collections.abc import Mapping

# Metrics of a training that the record of a run calls otherwise, as MLflow did in stores of earlier versions
METRICS = {
    "epoch_seconds": "speed/epoch_seconds",
    "examples_per_second": "speed/examples_per_second",
    "best_val_acc": "best/val_acc",
    "best_val_epoch": "best/val_epoch",
    "plateau_epoch": "best/plateau_epoch",
    "optimum_train_loss": "optimum/train_loss",
    "optimality_gap": "optimum/gap",
    "optimum_val_loss": "optimum/val_loss",
    "optimum_val_acc": "optimum/val_acc",
    "optimum_test_loss": "optimum/test_loss",
    "optimum_test_acc": "optimum/test_acc",
}
RECORDED = {metric: name for name, metric in METRICS.items()}

# of a training
RUN = "poolnet.run"  # the name of its record; also on its logged model
SWEEP = "poolnet.sweep"  # the name of the sweep that it is part of
DATA_SHA256 = "poolnet.data_sha256"
DEVICE = "poolnet.device"
CLASSES = "poolnet.classes"  # the names of the ten classes as a JSON list, where they are not A to J
GROUPS_CROSS = "poolnet.groups_cross"  # how many groups of the data set are in more than one split, if any
GIT_DIRTY = "poolnet.git_dirty"
DIFFERS = "poolnet.differs"  # the versions in which the machine that trained it differs from the one that swept, if any
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
NOTE_LIMIT = 8000  # characters, which MLflow cuts with a warning
TITLE = "mlflow.runName"
USER = "mlflow.user"
PARENT = "mlflow.parentRunId"
COMMIT = "mlflow.source.git.commit"
ORIGIN = ("mlflow.source.name", "mlflow.source.git.repoURL")  # the repository's address, as `mlflow run` knows it
CONTEXT = "mlflow.data.context"  # of an input: the name of the split
TABLES = "mlflow.loggedArtifacts"  # artifacts that the interface shows as tables
MODEL_VERSIONS = "mlflow.modelVersions"  # of a model


def section(name: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics with the name of a section before theirs."""
    return {f"{name}/{metric}": value for metric, value in metrics.items()}


def source(command: str, user: str) -> dict[str, str]:
    """Return the tags for who made a run, with which command."""
    return {"mlflow.source.name": f"poolnet {command}", "mlflow.source.type": "LOCAL", USER: user}
