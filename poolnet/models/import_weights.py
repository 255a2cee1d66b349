"""Register weights that were trained elsewhere.

For example by the notebook. They become a version of the registered model.
"""

import dataclasses
import errno
import hashlib
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from mlflow.tracking.client import MlflowClient

from poolnet.data import dataset
from poolnet.data.dataset import Dataset
from poolnet.errors import InputError
from poolnet.files import home, locked
from poolnet.models import WEIGHTS_FILE
from poolnet.text import DIGITS, coded, printable, step
from poolnet.tracking import description, names, publication, registry, result_runs, servers
from poolnet.tracking.model_card import Card
from poolnet.tracking.servers import Client
from poolnet.training.evaluation import Evaluation, evaluate
from poolnet.training.model import SimpleConvNet, SimplePoolNet, build_model

LOCK_SECONDS = 20  # for another command that registers weights
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Registered:
    version: int
    run_id: str
    experiment_id: str
    scores: dict[str, Evaluation]  # of val and test, where there were data to score on


def read(path: Path, pool: str) -> SimplePoolNet | SimpleConvNet:
    """Load a saved `state_dict` into a network of this pool.

    `torch.save` must have written the file, a regular one. It is unpickled as tensors only.
    """
    cure = f"expected {WEIGHTS_FILE}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # at a pickle that torch.save did not write
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, UserWarning):  # whose text explains how to run what is in the file after all
        raise InputError(f"{path}: found other things than tensors, which are not loaded; {cure}") from None
    except Exception as error:  # whatever torch says of other files, which means nothing to who never saw its code
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: of offsets in a cut file
            raise InputError(f"{path}: cannot be read ({error.strerror}), {cure}") from None
        kind, remedy = _kind(path)
        raise InputError(f"{path}: found {kind}, {cure}{remedy}") from None
    net = build_model(pool, seed=0)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise InputError(f"{path}: found no state_dict, {cure}")
    if not all(tensor.layout == torch.strided and tensor.dtype in DTYPES for tensor in weights.values()):
        raise InputError(f"{path}: found weights that are no plain floating-point tensors, {cure}")
    other = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if other != shapes:
        raise InputError(f"{path}: found {_listed(other)}, expected for --pool {pool}: {_listed(shapes)}")
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:  # of tensors without data, say
        raise InputError(f"{path}: cannot be loaded ({servers.reason(error)}), {cure}") from None
    if not all(tensor.isfinite().all() for tensor in net.state_dict().values()):  # as float32
        raise InputError(f"{path}: found weights that are not finite numbers")
    return net.eval()


def _kind(path: Path) -> tuple[str, str]:
    """Describe a file that torch cannot read.

    Returns what the file is, and how to make a file from it that torch can read. The second text is empty if no way is
    known.
    """
    if not path.stat().st_size:
        return "an empty file", ""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith(".npy") for name in archive.namelist()):
                arrays = "{name: torch.from_numpy(array) for name, array in np.load(FILE).items()}"
                return "arrays of NumPy", f"; make it with torch.save({arrays}, OTHER)"
    return "no weights of torch's, or damaged ones", ""


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "nothing"


def register(client: Client, path: Path, pool: str, source: str) -> Registered:
    """Register the weights in a file as a model version.

    A run in MLflow holds the weights as an exported model, which becomes a version of `poolnet`. If `source` names a
    data set, the run also holds the predictions of the model. Without predictions no test can compare the model.

    The same weights, scored on the same data, become a version only once. If a command was killed, the next command
    with the same weights and data finishes its run.
    """
    net = read(path, pool)
    splits = dataset.open_dataset(dataset.locate(source)) if source else None
    scores = {split.name: evaluate(net, split) for split in (splits.val, splits.test)} if splits else {}
    step("Exporting and uploading the model")
    example = splits.test.images(np.arange(2) % len(splits.test)) if splits else np.zeros((2, 1, 28, 28), np.float32)
    arrays = {name: tensor.numpy() for name, tensor in net.state_dict().items()} | {"example": example}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    params = {"pool": pool, "file": printable(path.name), "sha256": digest} | ({"data": source} if source else {})
    experiment_id = servers.own_experiment(client)
    same = f"{pool} {digest} {splits.sha256 if splits else ''}".strip()
    with locked(home() / "register.lock", LOCK_SECONDS):
        begun = ""
        for run in client.search_runs([experiment_id], f"tags.`{names.WEIGHTS}` = '{same}'", max_results=1):
            begun = run.info.run_id
            model = registry.logged(client, run) if run.info.status == "FINISHED" else None
            if model and (version := registry.version_of(client, begun, model.model_id)):
                return Registered(version, begun, experiment_id, scores)
        title = f"{pool} from {params['file']}"
        with result_runs.run(client, experiment_id, "register", title, begun, {names.WEIGHTS: same}) as run_id:
            run = client.get_run(run_id)
            model_id = registry.log(client, run, registry.logged(client, run), title, {**params, "epochs": 0}, arrays)
            _log(client, run_id, model_id, params, splits, scores)
            card = Card(pool, file=params["file"])
            if splits:
                val, test = scores["val"].acc, scores["test"].acc
                card = Card(pool, "", params["file"], splits.name, splits.sha256, val, test, len(splits.test))
            version = registry.register(client, run_id, model_id, card)
    return Registered(version, run_id, run.info.experiment_id, scores)


def _log(
    client: MlflowClient,
    run_id: str,
    model_id: str,
    params: dict[str, str],
    splits: Dataset | None,
    scores: dict[str, Evaluation],
) -> None:
    """Log data, scores and predictions of the weights to MLflow.

    The names are those that a training run uses.
    """
    note = f"Weights from {coded(params['file'])}, SHA-256 `{params['sha256'][:DIGITS]}`, trained elsewhere"
    if not splits:
        note += "; not scored on any data, so that `poolnet promote` has nothing to decide on."
        result_runs.log(client, run_id, metrics={}, params=params, tags={names.NOTE: note})
        return
    note += f"; scored on {coded(splits.name)}. Whether its test images took part in the training is not known here."
    final = {name: (evaluation.acc, evaluation.loss) for name, evaluation in scores.items()}
    test = scores["test"]
    note = "\n".join([*description.answer(final, test.logits.argmax(1) == test.y, splits.test.group), "", note])
    data = splits.summary()
    tags = {names.DATA_SHA256: splits.sha256, names.NOTE: note, **publication.data_tags(data)}
    inputs = publication.datasets(data)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "predictions"
        folder.mkdir()
        for name, evaluation in scores.items():
            arrays = {"logits": evaluation.logits, "y": evaluation.y}
            group = getattr(splits, name).group
            arrays |= {} if group is None else {"group": group}
            np.savez(folder / f"{name}.npz", allow_pickle=False, **arrays)
        client.log_inputs(run_id, [inputs[name] for name in scores])
        for name, evaluation in scores.items():
            metrics = {f"{name}_loss": evaluation.loss, f"{name}_acc": evaluation.acc}
            result_runs.log(
                client,
                run_id,
                metrics=metrics,
                params=params,
                tags=tags,
                folder=Path(scratch) if name == "test" else None,
                dataset=inputs[name],
                model_id=model_id,
            )
