"""What faults do to a run, which is nothing, and what that costs.

    python benchmarks/faults.py [--kills N] [--sweep-kills N] [--sync-kills N] [--model-kills N]
        [--full-disk N] [--server-runs N] [--at-once N] [--overhead-runs N] [--json]

Each part is done so many times, and what comes of it compared with what comes of the same without a fault: histories,
weights, predictions, and the whole record on the server. Kills are SIGKILL at a random moment; then the same command
again, of trainings, sweeps and `sync` by two processes at once.

kills           trainings, half of them together with the process that publishes, then resumed
sweep kills     sweeps of two poolings and two seeds
sync kills      `poolnet sync` to a new store, every other one with `--prune`; also `sync --prune`, again and again,
                beside a training
model kills     `promote` and `register`, each
full disk       each command on a small disk, with so many amounts of room, then with enough
server runs     trainings against a real server that is killed and restarted, or stopped and continued, all the while,
                then `sync`; their time, and that of trainings beside which it happens to a server that is not theirs
at once         trainings on a store that does not exist yet
overhead        trainings at full size, published to a server on loopback, and without record and tracking, in turn
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import mlflow
import numpy as np
import torch
from PIL import Image

from poolnet.data import npz
from poolnet.files import read_json
from poolnet.runs.run_record import RunRecord

FIGURES = ("train_loss", "train_acc", "val_loss", "val_acc")  # the same in each run; the times are not
POOLNET = [sys.executable, "-m", "poolnet"]


def letters(path: Path, train: int) -> Path:
    """Random pixels in which every label leaves a trace."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, n in (("train", train), ("val", train // 10), ("test", train // 10)):
        y = rng.integers(0, 10, n)
        X = rng.integers(0, 200, (n, 28, 28), dtype=np.uint8)
        X[np.arange(n), 2 * y + 2] = 255
        arrays[f"X_{name}"], arrays[f"y_{name}"] = X, y
    npz.save(path, arrays)
    return path


class World:
    """A folder with local state of its own, and a tracking server: a store in the folder, or an address."""

    kept: Path | None = None  # exports, which each home would make anew

    def __init__(self, folder: Path, data: Path, epochs: int, uri: str = ""):
        folder.mkdir(parents=True, exist_ok=True)
        if self.kept:
            shutil.copytree(self.kept, folder / "home" / "exports", dirs_exist_ok=True)
        self.folder, self.uri = folder, uri or f"sqlite:///{folder / 'mlflow.db'}"
        self.command = [*POOLNET, "train", "--data", str(data), "--epochs", str(epochs)]
        ours = {
            "POOLNET_HOME": str(folder / "home"),
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")} | ours

    def start(self, command: list[str], **options) -> subprocess.Popen:
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, stderr=subprocess.PIPE, **options)

    def finish(self, command: list[str], codes: tuple[int, ...] = (0,)) -> str:
        with self.start(command, stdout=subprocess.PIPE, text=True) as process:
            out, err = process.communicate()
        if process.returncode not in codes:
            raise click.ClickException(f"{' '.join(command)} ended with {process.returncode}: {err}")
        return out

    def runs(self) -> list[RunRecord]:
        return [RunRecord(path.parent) for path in sorted((self.folder / "home" / "runs").glob("*/record.json"))]


def outcome(run: RunRecord) -> dict[str, np.ndarray]:
    """What a run has come to, as its folder has it: histories, predictions, weights."""
    steps = [record["step"] for record in run.metrics()]
    records = {record["step"]: record["metrics"] for record in run.metrics()}
    found = {"steps": np.array(steps)}
    found |= {name: np.array([records[step][name] for step in sorted(records) if step]) for name in FIGURES}
    found |= {f"once {name}": np.array(value) for name, value in records.get(0, {}).items()}
    found |= run.load_tensors("model") or {}
    for path in (run.folder / "predictions").glob("*.npz"):
        found |= {f"{path.name} {key}": array for key, array in np.load(path).items()}
    return found


def differences(found: dict, expected: dict) -> list[str]:
    names = found.keys() | expected.keys()
    return sorted(n for n in names if n not in found or n not in expected or not np.array_equal(found[n], expected[n]))


def on_server(uri: str, run: RunRecord) -> dict[str, object]:
    """All that the server has of a run, apart from what no two runs share: names, times, and how long things took."""
    client = mlflow.MlflowClient(uri)
    found = client.search_runs(["0"], f"tags.`poolnet.run` = '{run.name}'")
    (only,) = found
    run_id = only.info.run_id
    histories = {key: client.get_metric_history(run_id, key) for key in only.data.metrics}
    journaled = {(key, r["step"], r["t"], value) for r in run.metrics() for key, value in r["metrics"].items()}
    published = [(key, m.step, m.timestamp, m.value) for key, history in histories.items() for m in history]
    models = client.search_logged_models(["0"], f"source_run_id = '{run_id}'")
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    artifacts = [entry for entry in client.list_artifacts(run_id) if not entry.is_dir]
    artifacts += [file for name in ("predictions", "figures") for file in client.list_artifacts(run_id, name)]
    own = ("poolnet.run", "mlflow.runName", "mlflow.note.content")
    note = only.data.tags.get("mlflow.note.content", "")
    for own_version in versions:
        note = note.replace(f"models:/poolnet/{own_version.version}", "models:/poolnet/N")
    return {
        "status": only.info.status,
        "times": (only.info.start_time == run.record["started"], only.info.end_time == run.ended()["t"]),
        "named as the record": only.info.run_name == run.name and {m.name for m in models} == {run.name},
        "params": only.data.params,
        "tags": {key: value for key, value in only.data.tags.items() if key not in own},
        "description": note,
        "metrics as journaled": (set(published) == journaled, len(published) == len(journaled)),
        "metrics": {
            key: [(m.step, m.value) for m in histories.get(key, [])] for key in (*FIGURES, "test_loss", "test_acc")
        },
        "inputs": sorted((i.dataset.name, i.dataset.digest, i.tags[0].value) for i in only.inputs.dataset_inputs),
        "artifacts": sorted((file.path, file.file_size) for file in artifacts if file.path != "record.json"),
        "models": [(str(m.status), len(only.outputs.model_outputs), m.params) for m in models],
        "model metrics": sorted((m.key, m.dataset_name) for model in models for m in model.metrics),
        "versions": [(v.name, v.tags) for v in versions],
    }


# --- kills -----------------------------------------------------------------------------------------------------------


def killed(world: World, command: list[str], moment: float, children_too: bool = False) -> None:
    """Begin the command, and kill it after `moment` seconds."""
    process = world.start(command, stdout=subprocess.DEVNULL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    if children_too and shutil.which("pkill"):
        subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=False)
    process.kill()
    process.communicate()


def kill_and_resume(world: World, moment: float, publisher_too: bool) -> str:
    """Train, kill after `moment` seconds, resume. Returns the phase that the kill hit."""
    killed(world, world.command, moment, publisher_too)
    left = world.runs()
    if not left:
        world.finish(world.command)
        return "before the record"
    run = left[0]
    ended = run.finished
    phase = "after the end" if ended else "during results" if 0 in [r["step"] for r in run.metrics()] else "in training"
    finish_twice(world, [*POOLNET, "train", "--resume", run.name])
    return phase


def finish_twice(world: World, command: list[str], refused: int = 2) -> None:
    """The command, by two processes at once: one at least does it, the other may say who is at it, with that code."""
    both = [world.start(command, stdout=subprocess.DEVNULL, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    codes = sorted(process.returncode for process in both)
    if codes not in ([0, 0], [0, refused]):
        raise click.ClickException(f"{' '.join(command)}, twice at once, ended with {codes}: {errors}")


def measure_kills(folder: Path, kills: int, seed: int, workers: int, epochs: int, train: int) -> dict[str, object]:
    rng = random.Random(seed)
    data = letters(folder / "letters.npz", train)
    template = World(folder / "undisturbed", data, epochs)
    template.finish(template.command)  # makes the store, and warms the disk
    start = time.perf_counter()
    template.finish(template.command)
    duration = time.perf_counter() - start
    expected, *_ = (outcome(run) for run in template.runs())
    plans = [(index, rng.uniform(0, duration * workers**0.5), rng.random() < 0.5) for index in range(kills)]

    def trial(plan: tuple[int, float, bool]) -> tuple[str, list[str]]:
        index, moment, publisher_too = plan
        world = World(folder / f"kill{index}", data, epochs)
        phase = kill_and_resume(world, moment, publisher_too)
        (run,) = world.runs()
        wrong = differences(outcome(run), expected)
        wrong += differences(on_server(world.uri, run), on_server(template.uri, template.runs()[0]))
        shutil.rmtree(world.folder)
        return phase, [f"kill {index} at {moment:.2f} s, {phase}: {name}" for name in wrong]

    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(trial, plans))
    phases = [phase for phase, _ in results]
    return {
        "kills": kills,
        "identical": sum(not wrong for _, wrong in results),
        "phases": {phase: phases.count(phase) for phase in sorted(set(phases))},
        "wrong": [line for _, wrong in results for line in wrong],
    }


# --- sweeps that are killed ------------------------------------------------------------------------------------------

STUDY = """question = "Which?"
seeds = [1, 2]
[grid]
pool = ["max", "avg"]
epochs = {epochs}
[arms]
max = {{ pool = "max" }}
avg = {{ pool = "avg" }}
"""


def stem(run: RunRecord) -> str:
    """What a run's name says of its pool and seed."""
    return run.name.rpartition("-")[0]


def measure_sweep_kills(folder: Path, kills: int, seed: int, epochs: int, train: int) -> dict[str, object]:
    """So many sweeps, each killed at a random moment and begun again by two at once: complete, and nothing twice."""
    rng = random.Random(seed)
    data, study = letters(folder / "sweep.npz", train), folder / "study.toml"
    study.write_text(STUDY.format(epochs=epochs), encoding="utf-8")
    command = [*POOLNET, "sweep", str(study), "--data", str(data), "--workers", "2"]
    calm = World(folder / "calm sweep", data, epochs)
    start = time.perf_counter()
    calm.finish(command)
    duration, expected, wrong = time.perf_counter() - start, {}, []
    for run in calm.runs():
        expected[stem(run)] = (outcome(run), on_server(calm.uri, run)["metrics"])
    for index in range(kills):
        world, moment = World(folder / f"sweep{index}", data, epochs), rng.uniform(0, duration)
        killed(world, command, moment)
        finish_twice(world, command)
        outcomes = {stem(run): (outcome(run), on_server(world.uri, run)["metrics"]) for run in world.runs()}
        twice = len(world.runs()) - len(outcomes)
        parents = mlflow.MlflowClient(world.uri).search_runs(["0"], "tags.`poolnet.study` LIKE '%'")
        status = [parent.info.status for parent in parents]
        same = outcomes.keys() == expected.keys() and not any(
            differences(outcomes[key][0], expected[key][0]) or outcomes[key][1] != expected[key][1] for key in outcomes
        )
        if not same or twice or status != ["FINISHED"]:
            wrong.append(f"sweep {index} at {moment:.2f} s: {sorted(outcomes)}, {twice} twice, {status}")
        shutil.rmtree(world.folder)
    return {"kills": kills, "identical": kills - len(wrong), "wrong": wrong}


def kill_sync(world: World, command: list[str], moment: float) -> str:
    """Sync, kill after `moment` seconds. Returns the phase that the kill hit."""
    killed(world, command, moment)
    if not world.runs():
        return "after the removal"
    published = read_json(world.runs()[0].folder / "published.json").get("servers", {}).get(world.uri, {})
    return "in publication" if published.get("run_id") else "before the run"


def measure_sync_kills(folder: Path, kills: int, seed: int, epochs: int, train: int) -> dict[str, object]:
    rng = random.Random(seed)
    data = letters(folder / "few letters.npz", train)
    template = World(folder / "calm sync", data, epochs)
    template.finish(template.command)
    (run,) = template.runs()
    expected = on_server(template.uri, run)
    begun = time.perf_counter()
    template.finish([*POOLNET, "sync", "--to", f"sqlite:///{folder / 'warm.db'}"])
    duration, phases, wrong = time.perf_counter() - begun, [], []
    for index in range(kills):
        world = World(folder / f"sync{index}", data, epochs)
        shutil.copytree(template.folder / "home", world.folder / "home", dirs_exist_ok=True)
        (world.runs()[0].folder / "published.json").unlink()
        command = [*POOLNET, "sync", "--to", world.uri, *(["--prune"] if index % 2 else [])]
        moment = rng.uniform(0, duration)
        phases.append(kill_sync(world, command, moment))
        finish_twice(world, command, refused=3)
        found = differences(on_server(world.uri, run), expected)
        found += ["folder"] if bool(world.runs()) == bool(index % 2) else []
        wrong += [f"sync kill {index} at {moment:.2f} s, {phases[-1]}: {name}" for name in found]
        shutil.rmtree(world.folder)
    beside = World(folder / "beside", data, epochs)
    wrong += [f"sync beside a training: {name}" for name in sync_beside_training(beside, epochs)]
    return {
        "kills": kills,
        "complete": kills - len({line.partition(" at ")[0] for line in wrong if line.startswith("sync kill")}),
        "phases": {phase: phases.count(phase) for phase in sorted(set(phases))},
        "wrong": wrong,
    }


def sync_beside_training(world: World, epochs: int) -> list[str]:
    """In what the record of a training is not whole, beside which all that can be is pruned again and again."""
    process = world.start(world.command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        world.finish([*POOLNET, "sync", "--prune"], codes=(0, 3))  # 3 where the training's own process was faster
    process.communicate()
    client = mlflow.MlflowClient(world.uri)
    runs = client.search_runs(["0"])
    found = {
        "exit code": process.returncode,
        "status": [run.info.status for run in runs],
        "epochs": [len(client.get_metric_history(run.info.run_id, "val_loss")) for run in runs],
        "versions": len(client.search_model_versions()),
    }
    return differences(found, {"exit code": 0, "status": ["FINISHED"], "epochs": [epochs], "versions": 1})


# --- registered models -----------------------------------------------------------------------------------------------


def registry(uri: str) -> dict[str, object]:
    """Versions, aliases and the runs of `register` there, without ids and times."""
    client = mlflow.MlflowClient(uri)
    versions = {}
    for version in client.search_model_versions("name = 'poolnet'"):
        tags = {key: value for key, value in version.tags.items() if not key.endswith(".since")}
        text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "then", version.description or "")
        versions[int(version.version)] = (tags, sorted(version.aliases), text)
    runs = []
    for run in client.search_runs(["0"], "tags.`poolnet.weights` LIKE '%'"):
        models = client.search_logged_models(["0"], f"source_run_id = '{run.info.run_id}'")
        paths = sorted(file.path for model in models for file in client.list_logged_model_artifacts(model.model_id))
        runs.append((run.info.status, run.data.metrics, run.data.params, len(models), paths))
    return {"versions": versions, "runs": runs}


def measure_model_kills(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """So many `promote`, and so many `register`, each killed at a random moment and begun again."""
    rng, wrong = random.Random(seed), []
    data = letters(folder / "models.npz", 1_000)
    template = World(folder / "models", data, 3)
    for pool in ("max", "avg"):
        template.finish([*template.command, "--pool", pool])
    template.finish([*POOLNET, "promote", "models:/poolnet/1"])
    (run,) = (run for run in template.runs() if run.name.startswith("max"))
    weights = folder / "weights.pt"
    tensors = {name: torch.from_numpy(array) for name, array in run.load_tensors("model").items() if name != "example"}
    torch.save(tensors, weights)

    def fresh(name: str) -> World:
        world = World(folder / name, data, 3)
        shutil.copy(template.folder / "mlflow.db", world.folder)  # its artifacts are shared, and only added to
        return world

    commands = {
        "promote": [*POOLNET, "promote", "models:/poolnet/2", "--force"],
        "register": [*POOLNET, "register", str(weights), "--pool", "max", "--data", str(data)],
    }
    for name, command in commands.items():
        calm, begun = fresh(name), time.perf_counter()
        calm.finish(command)
        duration, expected = time.perf_counter() - begun, registry(calm.uri)
        for index in range(kills):
            world, moment = fresh(f"{name}{index}"), rng.uniform(0, duration)
            killed(world, command, moment)
            world.finish(command)
            state = registry(world.uri)
            wrong += [f"{name} {index} at {moment:.2f} s: {part}" for part in state if state[part] != expected[part]]
    return {"kills": len(commands) * kills, "wrong": wrong}


# --- a full disk -----------------------------------------------------------------------------------------------------


def measure_full_disk(folder: Path, sizes: int) -> dict[str, object]:
    """Every command with so many amounts of room on its disk, then with enough: one line that says so, nothing lost."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        return {"skipped": "a file system of a fixed size can be mounted by root on Linux only", "wrong": []}
    wrong, tried = [], 0
    try:
        data, study = letters(folder / "full disk.npz", 1_000), folder / "study.toml"
        study.write_text(STUDY.format(epochs=3), encoding="utf-8")
        world = World(disk, data, 3)
        world.environment["TMPDIR"] = str(disk)
        world.finish([*POOLNET, "sweep", str(study), "--data", str(data)])
        run = world.runs()[0]
        weights = folder / "weights.pt"
        model = run.load_tensors("model").items()
        torch.save({name: torch.from_numpy(array) for name, array in model if name != "example"}, weights)
        pool = run.record["config"]["pool"]
        image = folder / "letter.png"
        Image.fromarray(np.load(data)["X_test"][0]).save(image)
        seed = iter(range(100, 1_000))
        commands = {
            "prepare": lambda: ["prepare", "glyphs", "--train=9", "--val=9", "--test=9", "--out", str(disk / "g.npz")],
            "train": lambda: ["train", "--data", str(data), "--epochs", "3", "--seed", str(next(seed))],
            "sync": lambda: ["sync", "--to", f"sqlite:///{disk / f'{next(seed)}.db'}"],
            "sweep": lambda: ["sweep", str(study), "--data", str(data)],
            "compare": lambda: ["compare", "--study", str(study), "--data", str(data)],
            "evaluate": lambda: ["evaluate", "models:/poolnet/1"],
            "predict": lambda: ["predict", "models:/poolnet/1", str(image)],
            "promote": lambda: ["promote", "models:/poolnet/1", "--alias", f"a{next(seed)}", "--force"],
            "reproduce": lambda: ["reproduce", run.name],
            "register": lambda: ["register", str(weights), "--pool", pool, "--data", str(data)],
        }
        for name, words in commands.items():
            for room in range(sizes):
                command = [*POOLNET, *words()]
                free = shutil.disk_usage(disk).free
                (disk / "filler").write_bytes(bytes(free - room * 100_000))
                process = world.start(command, stdout=subprocess.PIPE, text=True)
                out, err = process.communicate()
                (disk / "filler").unlink()
                tried += 1
                if (
                    process.returncode not in (0, 1, 2, 3)
                    or "Traceback" in err
                    or (process.returncode and not out + err)
                ):
                    wrong.append(f"{name} with {room * 100} kB: exit {process.returncode}: {err[-500:]}")
                if process.returncode and name == "train" and (left := [r for r in world.runs() if not r.finished]):
                    command = [*POOLNET, "train", "--resume", left[0].name]
                with world.start(command, stdout=subprocess.DEVNULL, text=True) as again:
                    err = again.communicate()[1]
                if again.returncode:
                    wrong.append(f"{name} again, with room: exit {again.returncode}: {err[-500:]}")
        for run in world.runs():
            if not run.finished:
                wrong.append(f"{run.name} did not come to its end")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    return {"commands": tried, "wrong": wrong}


# --- a server in trouble ---------------------------------------------------------------------------------------------


class Server:
    """A real tracking server on loopback, which can be killed, restarted, stopped and continued."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        folder.mkdir(parents=True)
        self.folder, self.address = folder, f"http://127.0.0.1:{self.port}"
        self.start()
        self.wait()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        if shutil.which("nice"):  # elsewhere it would be another machine's work
            command = ["nice", "-n", "19", *command]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.address}/health", timeout=5):
                return
            time.sleep(0.1)
        raise click.ClickException((self.folder / "log").read_text())

    def signal(self, signum: int) -> None:
        os.killpg(self.process.pid, signum)

    def stop(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def torment(self, rng: random.Random, over: threading.Event, events: dict[str, int]) -> None:
        """Kill and restart it, or let it hang, at random, until told that it is over."""
        while not over.wait(rng.uniform(0.5, 3)):
            event = rng.choice(["killed", "hung"])
            events[event] += 1
            if event == "killed":
                self.stop()
                over.wait(rng.uniform(0, 3))
                self.start()
            else:
                self.signal(signal.SIGSTOP)
                over.wait(rng.uniform(0.5, 5))
                self.signal(signal.SIGCONT)


BARE = """
import sys
from poolnet.runs import train_run
from poolnet.training import fast_step
from poolnet.training.config import TrainConfig

config = TrainConfig(data=sys.argv[1], epochs=int(sys.argv[2]))
splits, pooled = train_run.open_training_data(config, cache=True, echo=print)
fast_step.fit(config, splits, pooled, on_epoch=lambda record: print(record, flush=True))
"""


def bare(data: Path, epochs: int) -> list[str]:
    """The same training without record and tracking."""
    return [sys.executable, "-c", BARE, str(data), str(epochs)]


def timed_training(world: World, command: list[str]) -> tuple[float, float, int]:
    """Seconds from the first epoch's line to the last's, the longest between two, and the exit code."""
    times = []
    with world.start(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("Epoch"):
                times.append(time.perf_counter())
    return times[-1] - times[0], max(np.diff(times), default=0.0), process.returncode


def measure_server(folder: Path, runs: int, seed: int, epochs: int, train: int) -> dict[str, object]:
    rng = random.Random(seed)
    data = letters(folder / "more.npz", train)
    server, other = Server(folder / "server"), Server(folder / "other server")
    events = {"killed": 0, "hung": 0}
    calm, troubled, worlds = [], [], []

    def trained(world: World, tormented: Server, counts: dict[str, int]) -> tuple[float, float, int]:
        over = threading.Event()
        tormentor = threading.Thread(target=tormented.torment, args=(rng, over, counts))
        tormentor.start()
        try:
            return timed_training(world, [*world.command, "--drain-timeout", "5"])
        finally:
            over.set()
            tormentor.join()
            tormented.wait()

    try:
        undisturbed = World(folder / "calm", data, epochs, server.address)
        timed_training(undisturbed, bare(data, 1))  # warms the caches
        for index in range(runs):
            # In turn, so that what else the machine does hits both alike; and with another server in the same trouble,
            # whose restarts take as much of this machine.
            calm.append(trained(undisturbed, other, {"killed": 0, "hung": 0}))
            worlds.append(World(folder / f"troubled{index}", data, epochs, server.address))
            troubled.append(trained(worlds[-1], server, events))
        expected = on_server(server.address, undisturbed.runs()[0])
        wrong = []
        for index, world in enumerate(worlds):
            world.finish([*POOLNET, "sync"])
            (run,) = world.runs()
            wrong += [f"run {index}: {name}" for name in differences(on_server(server.address, run), expected)]
            wrong += [f"run {index}: {n}" for n in differences(outcome(run), outcome(undisturbed.runs()[0]))]
    finally:
        server.stop()
        other.stop()
    calm_seconds, troubled_seconds = (statistics.median(run[0] for run in kind) for kind in (calm, troubled))
    codes = [run[2] for run in troubled]
    return {
        "runs": runs,
        "server_killed": events["killed"],
        "server_hung": events["hung"],
        "exit_codes": {str(code): codes.count(code) for code in sorted(set(codes))},
        "training_seconds_calm": calm_seconds,
        "training_seconds_troubled": troubled_seconds,
        "training_ratio": troubled_seconds / calm_seconds,
        "longest_stall_seconds": float(max(run[1] for run in troubled)),
        "identical": runs - len({line.partition(":")[0] for line in wrong}),
        "wrong": wrong,
    }


# --- many at once ---------------------------------------------------------------------------------------------------


def measure_at_once(folder: Path, count: int) -> dict[str, object]:
    """So many processes at the same time, on a store that does not exist yet."""
    world = World(folder / "at once", letters(folder / "few.npz", 1_000), epochs=3)
    running = [world.start(world.command, stdout=subprocess.DEVNULL, text=True) for _ in range(count)]
    errors = [process.communicate()[1] for process in running]
    client = mlflow.MlflowClient(world.uri)
    statuses = [run.info.status for run in client.search_runs(["0"])]
    versions = {(version.version, version.run_id) for version in client.search_model_versions("name = 'poolnet'")}
    return {
        "processes": count,
        "exit_codes": [process.returncode for process in running],
        "finished_runs": statuses.count("FINISHED"),
        "versions": len(versions),
        "wrong": [error for error in errors if error],
    }


# --- what it costs ---------------------------------------------------------------------------------------------------


def measure_overhead(folder: Path, runs: int, epochs: int, train: int) -> dict[str, object]:
    data = letters(folder / "full.npz", train)
    server = Server(folder / "overhead-server")
    try:
        world = World(folder / "overhead", data, epochs, server.address)
        plain = bare(data, epochs)
        timed_training(world, plain)
        pairs = [(timed_training(world, plain)[0], timed_training(world, world.command)[0]) for _ in range(runs)]
    finally:
        server.stop()
    without, published = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {"runs": runs, "seconds_bare": without, "seconds_published": published, "ratio": published / without}


COUNT = click.IntRange(min=0)


@click.command()
@click.option("--kills", type=COUNT, default=50, show_default=True, help="Trainings that are killed and resumed.")
@click.option("--sweep-kills", type=COUNT, default=20, show_default=True, help="Sweeps that are killed, as well.")
@click.option("--sync-kills", type=COUNT, default=20, show_default=True, help="Runs of `sync` that are killed.")
@click.option("--model-kills", type=COUNT, default=20, show_default=True, help="Of `promote` and `register`, each.")
@click.option("--full-disk", type=COUNT, default=4, show_default=True, help="Amounts of room for each command.")
@click.option("--server-runs", type=COUNT, default=10, show_default=True, help="Trainings with a server in trouble.")
@click.option("--at-once", type=COUNT, default=16, show_default=True, help="Trainings that start at the same time.")
@click.option("--overhead-runs", type=COUNT, default=7, show_default=True, help="Trainings with and without tracking.")
@click.option("--seed", default=0, show_default=True, help="Seed of the moments.")
@click.option("--workers", default=2, show_default=True, help="Killed trainings at the same time.")
@click.option("--epochs", default=300, show_default=True, help="Epochs of each training.")
@click.option("--images", default=30_000, show_default=True, help="Images an epoch; five times that for the server.")
@click.option("--full", default=415_752, show_default=True, help="Images an epoch for the overhead, over 30 epochs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(
    kills: int,
    sweep_kills: int,
    sync_kills: int,
    model_kills: int,
    full_disk: int,
    server_runs: int,
    at_once: int,
    overhead_runs: int,
    seed: int,
    workers: int,
    epochs: int,
    images: int,
    full: int,
    as_json: bool,
) -> None:
    result: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        maker = World(folder / "maker", letters(folder / "maker.npz", 1_000), 1)
        maker.finish(maker.command)
        World.kept = maker.folder / "home" / "exports"
        if kills:
            result["kills"] = measure_kills(folder, kills, seed, workers, epochs, images)
        if sweep_kills:
            result["sweep kills"] = measure_sweep_kills(folder, sweep_kills, seed, epochs, images)
        if sync_kills:
            result["sync kills"] = measure_sync_kills(folder, sync_kills, seed, 3, 1_000)
        if model_kills:
            result["model kills"] = measure_model_kills(folder, model_kills, seed)
        if full_disk:
            result["full disk"] = measure_full_disk(folder, full_disk)
        if server_runs:
            result["server"] = measure_server(folder, server_runs, seed, epochs, 5 * images)
        if at_once:
            result["at once"] = measure_at_once(folder, at_once)
        if overhead_runs:
            result["overhead"] = measure_overhead(folder, overhead_runs, 30, full)
    if as_json:
        click.echo(json.dumps({"seed": seed, **result}))
    else:
        click.echo(f"seed {seed}")
        for part, numbers in result.items():
            for key, value in numbers.items():
                click.echo(f"{part}: {key:28}{value}")
    if any(part.get("wrong") for part in result.values()):
        raise click.ClickException("a run that met a fault differs from one that met none")


if __name__ == "__main__":
    main()
