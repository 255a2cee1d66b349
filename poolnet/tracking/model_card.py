"""Say what a version of `poolnet` is.

The tags of a version are rounded to what a person reads. The exact numbers are metrics of its run, and nothing that
decides reads these tags. There is no interval, which numbers of letters alone do not give: letters of a family are
right or wrong together.
"""

import json
from dataclasses import dataclass

from mlflow.entities import Run

from poolnet.errors import InputError
from poolnet.text import marked
from poolnet.tracking import names

# The ends of lines are shown as they are, but for those that are escaped here.
DESCRIPTION = """\
Networks of two 2x2 poolings, ReLU and one linear classifier. They say which letter, A to J, is on an image of 28x28 \
pixels. The baseline `pool=conv` has convolutions in place of the poolings.

`champion` is the version to use. `poolnet promote` gives this alias to another version if an exact paired test on \
the same validation letters shows that it is better. Letters of a family are kept together in it, and its 5 % are \
shared among 10 challengers of a champion. `champion-max` and `champion-avg` are the best of one pooling.

```python
import poolnet
model = poolnet.load_model("models:/poolnet@champion")
logits = model(images)  # float32 (N, 1, 28, 28) in 0..1 -> (N, 10)
```
"""


@dataclass(frozen=True)
class Card:
    """The facts in the tags and description of a version.

    `seed` is that of the training, and `fold` its fold, if any. `file` names the file of weights that were trained
    elsewhere. Such weights have no scores if they were registered without data.
    """

    pool: str
    seed: str = ""
    file: str = ""
    data: str = ""
    data_sha256: str = ""
    val_acc: float | None = None
    test_acc: float | None = None
    n_test: int = 0
    fold: str = ""

    @property
    def tags(self) -> dict[str, str]:
        accs = {"val_acc": self.val_acc, "test_acc": self.test_acc}
        rounded = {name: f"{acc:.4f}" for name, acc in accs.items() if acc is not None}
        tags = {"pool": self.pool, "seed": self.seed, "fold": self.fold, "source": self.file}
        tags["data_sha256"] = self.data_sha256[:12]
        return {name: text for name, text in (tags | rounded).items() if text}

    @property
    def sentence(self) -> str:
        origin = f"weights from {marked(self.file)}" if self.file else f"seed {marked(self.seed)}"
        origin += f", fold {marked(self.fold)}" if self.fold else ""
        if self.val_acc is None or self.test_acc is None:
            return f"{self.pool} pooling, {origin}, not scored on any data."
        return (
            f"{self.pool} pooling, {origin}, {'scored' if self.file else 'trained'} on {marked(self.data)}: accuracy "
            f"{self.val_acc:.4f} on val and {self.test_acc:.4f} on {self.n_test:,} test images. "
            "`poolnet evaluate` gives the intervals."
        )


def of_run(run: Run, pool: str, seed: str) -> Card:
    """Return the facts about the model of a run.

    The run is a training on a server. Raises `InputError` if the run lacks some of them.
    """
    inputs, context = run.inputs.dataset_inputs if run.inputs else [], (names.CONTEXT, "test")
    tests = [entry.dataset for entry in inputs if context in [(tag.key, tag.value) for tag in entry.tags]]
    metrics, data_sha256 = run.data.metrics, run.data.tags.get(names.DATA_SHA256)
    if not tests or not data_sha256 or not metrics.keys() >= {"val_acc", "test_acc"}:
        raise InputError(f"{run.info.run_name}: found no scores or no data set in its run, which poolnet train logs")
    n_test, fold = json.loads(tests[0].profile or "{}")["features_shape"][0], run.data.params.get("fold", "")
    return Card(pool, seed, "", tests[0].name, data_sha256, metrics["val_acc"], metrics["test_acc"], n_test, fold)
