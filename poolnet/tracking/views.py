"""Saved views of an experiment's runs, which MLflow's interface opens.

MLflow 3.17 keeps a named view in a tag of the experiment. Its "Views" menu lists them. This is not documented, and no
other module knows the format. A server that ignores these tags shows its own table of runs instead.
"""

import base64
import json
import time
import zlib
from typing import Any

from mlflow.exceptions import MlflowException

from poolnet.tracking import names, pages, servers
from poolnet.tracking.servers import Client
from poolnet.training.config import POOLS

TAG = "mlflow.sharedViewState."  # and the key of the view
HEAD = "Runs of poolnet: "  # of the experiment's description
NOTE = (  # in one line, whose ends MLflow shows
    "Is average or max pooling better for letters? These are the runs of poolnet: trainings, sweeps with their runs "
    "below them, comparisons with `report.html` among their artifacts, and evaluations of models."
)
CURVES = ("val_acc", "val_loss", "train_acc", "train_loss")
SCORES = ("test_acc", "test_loss")
COLUMNS = {  # of the table of runs, with their widths in pixels
    **{f"params.`{name}`": 70 for name in ("pool", "seed", "epochs")},
    **{f"metrics.`{name}`": 85 for name in ("val_acc", "val_loss", "test_acc", "test_loss")},
    "attributes.`Dataset`": 150,
    "attributes.`Models`": 150,
}
TRAININGS = f"tags.`{names.RUN}` IS NOT NULL AND tags.`{names.REPRODUCES}` IS NULL"

States = dict[str, tuple[str, dict[str, Any]]]  # the names of views and what they show, by key


def keep(client: Client, experiment_id: str, data: str, data_sha256: str) -> None:
    """Write the missing views of a data set.

    `data` is the name of the data set. Curves and means are of one data set, since over several they would say nothing.
    Views and descriptions of others stay as they are.
    """
    servers.once(client, _keep, experiment_id, data, data_sha256)


def _keep(client: Client, experiment_id: str, data: str, data_sha256: str) -> str:
    try:
        _write_missing(client, experiment_id, _states(data, data_sha256), data_sha256[:4])
    except MlflowException as error:
        if not servers.is_refusal(error):  # of a server that keeps no views, but has the runs all the same
            raise
    return experiment_id


def _write_missing(client: Client, experiment_id: str, states: States, tail: str) -> None:
    tags = client.get_experiment(experiment_id).tags
    views = {key.removeprefix(TAG): _name(value) for key, value in tags.items() if key.startswith(TAG)}
    missing = {key: state for key, state in states.items() if not views.get(key)}  # or damaged
    now = time.time_ns() // 1_000_000
    for place, (key, (name, state)) in enumerate(missing.items()):  # the menu lists the newest first
        name += f" ({tail})" * (name in views.values())  # of another data set with this name
        views[key] = name
        client.set_experiment_tag(experiment_id, TAG + key, _tag(name, state, now - place))
    note, before = _note(experiment_id, views), tags.get(names.NOTE, "")
    is_ours = before.startswith(HEAD) and before.endswith(NOTE)  # but lacks views, after a kill or of another process
    if before != note and (is_ours or not before):
        client.set_experiment_tag(experiment_id, names.NOTE, note)


def _states(data: str, data_sha256: str) -> States:
    on_data = f"{TRAININGS} AND tags.`{names.DATA_SHA256}` = '{data_sha256}'"
    key, pool = pages.view_of(data_sha256), {"mode": "param", "groupByData": "pool"}
    means = {
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [pool]},
        "groupsExpanded": {f"param.pool.{name}": False for name in POOLS},
        "runListHidden": True,
    }
    return {
        key: (f"max against avg on {data}", _state(on_data, columns=4, **means)),
        f"{key}-seeds": (f"seeds on {data}", _state(on_data, columns=2)),  # beside the list of runs
        pages.LEADERBOARD: ("leaderboard", _state(TRAININGS, columns=2)),
    }


def _state(runs: str, columns: int, **more: Any) -> dict[str, Any]:
    """Return what a view shows.

    These are the runs that a filter of MLflow finds. Its charts of learning curves are in so many columns.
    """
    sections = [("curves", "Learning curves", columns, 260), ("test", "On test", 2, 220)]
    cards = [_card("LINE", metric, "curves", **LINE) for metric in CURVES]
    cards += [_card("BAR", metric, "test") for metric in SCORES]
    return {
        "searchFilter": runs,
        "orderByKey": "metrics.`val_acc`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": list(COLUMNS),
        "columnOrder": list(COLUMNS),
        "columnWidths": COLUMNS,
        "groupBy": None,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "runsHiddenMode": "SHOWALL",
        "isAccordionReordered": True,  # or the sections are sorted by name
        "compareRunSections": [
            {"uuid": uuid, "name": name, "columns": count, "cardHeight": height, "display": True, "isReordered": True}
            for uuid, name, count, height in sections
        ],
        "compareRunCharts": cards,
        **more,
    }


LINE = {
    "scaleType": "linear",
    "xAxisKey": "step",
    "xAxisScaleType": "linear",
    "selectedXAxisMetricKey": "",
    "range": {},
    "lineSmoothness": 0,
    "useGlobalXaxisKey": True,
    "useGlobalLineSmoothing": True,
}


def _card(kind: str, metric: str, section: str, **more: Any) -> dict[str, Any]:
    return {
        "uuid": metric,
        "type": kind,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "metricSectionId": section,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
        **more,
    }


def _tag(name: str, state: dict[str, Any], t: int) -> str:
    """Return the value of a view's tag.

    The view is made at `t`, in ms since 1970. It is packed, since older servers hold 5,000 characters.
    """
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return json.dumps({"name": name, "createdAt": t, "updatedAt": t, "state": f"deflate;{packed}"})


def _name(tag: str) -> str:
    """Return the name of a view from its tag, if any."""
    try:
        view = json.loads(tag)
    except ValueError:
        return ""
    return str(view.get("name", "")) if isinstance(view, dict) else ""


def _note(experiment_id: str, views: dict[str, str]) -> str:
    """Return the experiment's description.

    It begins with our views, since MLflow folds all but its first line.
    """
    ours = sorted(filter(pages.is_view, views))  # in one order, or two processes would write it in turn
    links = [pages.in_markdown(views[key], pages.view(experiment_id, key)) for key in ours]
    return f"{HEAD}{' · '.join(links)}\n\n{NOTE}"
