"""Describe a run for MLflow's user interface, in Markdown.

The text has the result, what the result is based on, and how to use and repeat it.
"""

from poolnet.runs.run_record import RunRecord
from poolnet.stats import scores
from poolnet.text import coded, pasted
from poolnet.tracking import registry
from poolnet.training.config import PLATEAU_MARGIN


def of_run(run: RunRecord, version: int | None) -> str:
    """Return the description of a finished run.

    It also says how to use the run's model version, if it has one.
    """
    record, records = run.record, run.by_step()
    once, last = records[0], records[max(records)]
    data, environment = record["data"], record["environment"]
    sizes = {split["name"]: split["shape"][0] for split in data["splits"]}
    acc = scores.wilson(round(once["test_acc"] * sizes["test"]), sizes["test"])
    options = [word for name, value in record["config"].items() for word in (f"--{name}", value)]
    lines = [
        f"**Test accuracy {once['test_acc']:.4f}**, 95 % interval over the {sizes['test']:,} test letters "
        f"{acc.low:.4f} to {acc.high:.4f} (Wilson; other seeds vary as well). Test loss {once['test_loss']:.4f}.",
        "",
        "| final weights | train, last epoch | val | test |",
        "|---|---|---|---|",
        f"| loss | {last['train_loss']:.4f} | {last['val_loss']:.4f} | {once['test_loss']:.4f} |",
        f"| accuracy | {last['train_acc']:.4f} | {last['val_acc']:.4f} | {once['test_acc']:.4f} |",
        "",
        f"- Best validation accuracy: {once['best_val_acc']:.4f} in epoch {once['best_val_epoch']}; "
        f"within {PLATEAU_MARGIN} of it from epoch {once['plateau_epoch']} on",
        f"- Data: {coded(data['name'])}, train / val / test {' / '.join(f'{size:,}' for size in sizes.values())}, "
        f"SHA-256 `{data['sha256']}`"
        + (f". **{data['overlap']:,} test images also occur in train.**" if data["overlap"] else ""),
        f"- Code: commit `{record['code']['commit'] or 'unknown'}`, uncommitted changes: {record['code']['dirty']}",
        f"- Machine: {record['device']}, torch {environment['torch']} ({environment['threads']} threads), "
        f"Python {environment['python']}, {environment['system']} {environment['machine']}",
        f"- Again: {coded(pasted('poolnet', 'train', *options))}",
    ]
    if "optimum_train_loss" in once:
        lines.append(
            f"- Lowest train loss that any weights reach: {once['optimum_train_loss']:.6f}; the trained ones are "
            f"{once['optimality_gap']:.6f} above it"
        )
    if version:
        model = f"models:/{registry.NAME}/{version}"
        lines.append(f'- Use: `poolnet evaluate {model}`, or in Python `poolnet.load_model("{model}")`')
    return "\n".join(lines)
