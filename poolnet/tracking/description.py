"""Describe a run for MLflow's user interface, in Markdown.

The text has the result, what the result is based on, and how to use and repeat it. MLflow folds it after some six
lines, so the result comes first.
"""

from collections.abc import Mapping

import numpy as np

from poolnet.runs.run_record import RunRecord
from poolnet.stats import scores
from poolnet.text import DIGITS, SHARE, coded, interval, pasted, piped
from poolnet.tracking import registry
from poolnet.training.config import PLATEAU_MARGIN


def of_run(run: RunRecord, version: int | None) -> str:
    """Return the description of a finished run.

    It also says how to use the run's model version, if it has one.
    """
    record, records = run.record, run.by_step()
    once, last = records[0], records[max(records)]
    data, code, environment, config = record["data"], record["code"], record["environment"], record["config"]
    sizes = {split["name"]: split["shape"][0] for split in data["splits"]}
    final = {"train, last epoch": (last["train_acc"], last["train_loss"]), "val": (last["val_acc"], last["val_loss"])}
    options = [word for name, value in config.items() if value != "" for word in (f"--{name}", value)]
    logits, y, group = run.load_predictions("test")
    others = "families" if group is not None else "letters, as if each were independent"
    lines = [
        *answer(final | {"test": (once["test_acc"], once["test_loss"])}, logits.argmax(1) == y, group),
        "",
        f"- The interval (Wilson's) is about other {others}; other seeds vary as well",
        f"- Best validation accuracy: {once['best_val_acc']:{SHARE}} in epoch {once['best_val_epoch']}; "
        f"within {PLATEAU_MARGIN} of it from epoch {once['plateau_epoch']} on",
        f"- Data: {coded(data['name'])}, train / val / test {' / '.join(f'{size:,}' for size in sizes.values())}, "
        f"SHA-256 `{data['sha256'][:DIGITS]}`"
        + (f", fold {config['fold']}" if config["fold"] else "")
        + (f". **{data['overlap']:,} test images also occur in train.**" if data["overlap"] else ""),
        f"- Code: commit `{(code['commit'] or 'unknown')[:DIGITS]}`, uncommitted changes: {code['dirty']}",
        f"- Machine: {record['device']}, torch {environment['torch']} ({environment['threads']} threads), "
        f"Python {environment['python']}, {environment['system']} {environment['machine']}",
        f"- Again: {coded(pasted('poolnet', 'train', *options))}",
    ]
    if "optimum_train_loss" in once:
        lines.append(
            f"- Lowest train loss that any weights reach: {once['optimum_train_loss']:.6f}; the trained ones are "
            f"{once['optimality_gap']:.6f} above it"
        )
    if "optimum_test_acc" in once:
        acc, loss = once["optimum_test_acc"], once["optimum_test_loss"]
        lines.append(f"- On test with the weights that reach it: accuracy {acc:{SHARE}}, loss {loss:{SHARE}}")
    if version:
        model = f"models:/{registry.NAME}/{version}"
        lines.append(f'- Use: `poolnet evaluate {model}`, or in Python `poolnet.load_model("{model}")`')
    return "\n".join(lines)


def answer(final: Mapping[str, tuple[float, float]], right: np.ndarray, group: np.ndarray | None) -> list[str]:
    """Return the first lines: test accuracy, and a table.

    `final` has the accuracy and the loss of each split with the final weights. `right` (N,) says which test letters are
    right, and `group` (N,) of which family each is, if the data say so.
    """
    share = scores.wilson(right, group)
    rows = [["final weights", *final]]
    rows += [[name, *(f"{each[i]:{SHARE}}" for each in final.values())] for i, name in enumerate(("accuracy", "loss"))]
    sentence = f"**Test accuracy {share.estimate:{SHARE}}**, 95 % interval {interval(share.low, share.high)} over "
    sentence += f"{len(right):,} letters" + (f" of {len(np.unique(group)):,} families." if group is not None else ".")
    return [sentence, "", *piped(rows)]
