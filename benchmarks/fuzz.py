"""What damaged files do: nothing is lost, nobody waits for ever, and no figure is wrong without a word.

    python benchmarks/fuzz.py [--records N] [--caches N] [--studies N] [--images N] [--arrays N] [--json]

`records`: so many times one file of a run's folder is damaged; then `sync --dry-run`, `sync`, `train --resume` and
`sweep` are run. What the server has in the end must be what an undamaged run has, for the run beside it too. `caches`:
cached features, then `train`, whose figures must be the same. `studies`: study files, for
`compare` and `sweep`. `images`: pictures, for `predict`, beside one that is whole. `arrays`: `.npz` files; what is
accepted must be what NumPy reads from them. A command that fails must say so in a line without a traceback, and end
within two minutes.
"""

import contextlib
import faulthandler
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
from faults import FIGURES, POOLNET, STUDY, World, letters
from PIL import Image

from poolnet import files
from poolnet.cli.commands import main as run_command
from poolnet.data import dataset
from poolnet.errors import InputError, RunError
from poolnet.runs.run_record import RunRecord
from poolnet.studies import study

SECONDS = 120  # that a command may take
EPOCHS = 3
BATCH = 10  # records that are damaged at once, beside one that is not
CODES = (0, 1, 2, 3)
DEEP = "[" * 5_000
VALUES = (None, -1, float("nan"), "", "x" * 5_000, "\x1b[2J", [], [[1]], {}, {"a": {}})
MORE = (True, 0, 2**70, 1e308)  # in a record's settings these would be another run

Wrong = list[str]  # what is wrong of a case, in words


# --- damage ----------------------------------------------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """What a disk, a copy that was cut off, or a wrong hand makes of a file."""
    size = max(1, len(content))
    start = rng.randrange(size)
    end = min(size, start + rng.choice((1, 16, 512)))
    flipped = bytearray(content or b"\0")
    for at in [start] if rng.random() < 0.5 else rng.choices(range(size), k=8):
        flipped[at] ^= 1 << rng.randrange(8)
    kinds = {
        "bits": bytes(flipped),
        "cut off": content[:start],
        "zeros": content[:start] + bytes(end - start) + content[end:],
        "a piece gone": content[:start] + content[end:],
        "a piece twice": content[:end] + content[start:],
        "empty": b"",
        "noise": rng.randbytes(min(size, 5_000)),
        "deep": DEEP.encode(),
    }
    kind = rng.choice(list(kinds))
    return kind, kinds[kind]


def other_form(found: object, rng: random.Random, values: tuple) -> object:
    """JSON of another form: a part that is gone, more, or of another type, as another version may write it."""
    if isinstance(found, (dict, list)) and found and rng.random() < 0.8:
        key = rng.choice(list(found) if isinstance(found, dict) else range(len(found)))
        changed = dict(found) if isinstance(found, dict) else list(found)
        if isinstance(found, dict) and (fate := rng.random()) < 0.4:
            if fate < 0.2:
                del changed[key]
            else:
                changed["later"] = rng.choice(values)
        else:
            changed[key] = other_form(found[key], rng, values)
        return changed
    return rng.choice(values)


def damage_file(path: Path, rng: random.Random) -> str:
    """Damage it in place. Returns how."""
    if path.suffix == ".json" and rng.random() < 0.5:
        values = VALUES if path.name == "record.json" else VALUES + MORE
        changed = other_form(files.read_json(path), rng, values)
        if isinstance(changed, dict) and rng.random() < 0.5:
            changed = files.sealed(changed)
        path.write_text(json.dumps(changed), encoding="utf-8")
        return f"{path.name}: another form"
    if rng.random() < 0.1:
        path.unlink()
        if rng.random() < 0.5:
            path.mkdir()
        return f"{path.name}: gone, or a folder"
    kind, content = damaged(path.read_bytes(), rng)
    path.write_bytes(content)
    return f"{path.name}: {kind}"


# --- commands in a process of their own ------------------------------------------------------------------------------


def command(*args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, here in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)
        try:
            run_command([str(arg) for arg in args])
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            code = -1
            traceback.print_exc(file=err)
        finally:
            faulthandler.cancel_dump_traceback_later()
    return code, out.getvalue(), err.getvalue()


def checked(wrong: Wrong, *args: object, codes: Iterable[int] = CODES) -> tuple[int, str]:
    """Run a command, and add to `wrong` what is wrong with its end. Returns exit code and stdout."""
    code, out, err = command(*args)
    if code not in codes or "Traceback" in err or (code and not (err.strip() or out.strip())):
        wrong.append(f"{' '.join(map(str, args))[:200]}: exit {code}: {err.strip()[-600:]}")
    if any(not char.isprintable() for char in err.replace("\n", "")):
        wrong.append(f"{' '.join(map(str, args))[:200]}: not printable: {err[:200]!a}")
    return code, out


def _in_process(connection, environment: dict[str, str], folder: Path, work: Callable, args: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    try:
        connection.send(work(*args))
    except BaseException:
        connection.send([traceback.format_exc()])


def apart(world: World, work: Callable[..., Wrong], *args: object) -> Wrong:
    """What `work` finds in a process of its own."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(
            ["poolnet.tracking.sync", "poolnet.studies.sweep", "poolnet.runs.train_run", "poolnet.studies.report"]
        )
    ours, theirs = context.Pipe()
    process = context.Process(target=_in_process, args=(theirs, world.environment, world.folder, work, args))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return [f"a command was stuck for {SECONDS} s, see above, or its process died"]
    finally:
        process.kill()
        process.join()


def tried(folder: Path, count: int, workers: int, trial: Callable[[Path, int], tuple[str, Wrong]]) -> dict[str, object]:
    """So many trials, each in a folder that no other uses meanwhile: how many, and what was wrong."""
    slots = [folder / str(slot) for slot in range(workers)]

    def run(slot: int) -> Wrong:
        wrong: Wrong = []
        for index in range(slot, count, workers):
            what, lines = trial(slots[slot], index)
            for line in lines:
                click.echo(f"{what}: {line}", err=True)
            wrong += lines
        return wrong

    with ThreadPoolExecutor(workers) as pool:
        wrong = [line for lines in pool.map(run, range(workers)) for line in lines]
    return {"cases": count, "wrong": wrong}


# --- records ---------------------------------------------------------------------------------------------------------


def on_server(uri: str) -> dict[tuple, list[dict]]:
    """The runs there by pooling, seed and status: all figures but the times, and the predictions."""
    import mlflow

    client, found = mlflow.MlflowClient(uri), {}
    for run in client.search_runs(["0"], "tags.`poolnet.run` LIKE '%'"):
        figures = {
            (name, metric.step): metric.value
            for name in (*FIGURES, "test_loss", "test_acc")
            for metric in client.get_metric_history(run.info.run_id, name)
        }
        if run.info.status == "FINISHED":
            with tempfile.TemporaryDirectory() as scratch:
                path = client.download_artifacts(run.info.run_id, "predictions/test.npz", scratch)
                with np.load(path) as saved:
                    figures["logits"] = saved["logits"].tobytes()
        key = run.data.params.get("pool"), run.data.params.get("seed"), run.info.status
        found.setdefault(key, []).append(figures)
    return found


def record_case(uri: str, names: list[str], study_file: Path, letters_file: Path, expected: dict) -> Wrong:
    """The four commands on a home in which the records of these runs are damaged."""
    wrong: Wrong = []
    checked(wrong, "sync", "--dry-run")
    checked(wrong, "sync")
    if not any(expected[key] in on_server(uri).get(key, []) for key in expected if key[:2] == WHOLE):
        wrong.append("sync: the undamaged run was not published")
    commands = [("train", "--resume", name) for name in names]
    random.Random(" ".join(names)).shuffle(commands)
    for words in commands[: len(commands) // 2]:
        checked(wrong, *words)
    code, _ = checked(wrong, "sweep", study_file, "--data", letters_file, "--workers", "1")
    for words in commands[len(commands) // 2 :]:
        checked(wrong, *words)
    have = on_server(uri)
    for (pool, seed, status), runs in have.items():
        right = expected[pool, seed, "FINISHED"]
        if any(figures[key] != right.get(key) for figures in runs for key in figures):
            wrong.append(f"the server has other figures of {pool}, seed {seed}, {status}")
    missing = [key for key in expected if expected[key] not in have.get(key, [])]
    if missing and code == 0:
        wrong.append(f"sweep: exit 0, but the server has no whole run of {missing}")
    return wrong


WHOLE = ("max", "1")  # the run that is not damaged
PARTS = [  # of a record, that are read back
    *("record.json", "metrics.jsonl", "end.json", "published.json", "model.safetensors"),
    *("checkpoint-0.safetensors", "checkpoint-1.safetensors", "predictions/val.npz", "predictions/test.npz"),
]


def measure_records(folder: Path, count: int, seed: int, workers: int) -> dict[str, object]:
    letters_file, study_file = letters(folder / "letters.npz", 300), folder / "study.toml"
    study_file.write_text(STUDY.replace("[1, 2]", "[1, 2, 3, 4, 5, 6]").format(epochs=EPOCHS), encoding="utf-8")
    cases = -(-count // BATCH)
    for slot in range(min(workers, cases)):  # whose records hold its own address
        world = World(folder / str(slot), letters_file, EPOCHS)
        world.finish([*POOLNET, "sweep", str(study_file), "--data", str(letters_file)])
        expected = {key: runs[0] for key, runs in on_server(world.uri).items()}
        world.folder.rename(folder / f"whole {slot}")

    def trial(place: Path, index: int) -> tuple[str, Wrong]:
        rng = random.Random(f"{seed} {index}")
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / f"whole {place.name}", place)
        world = World(place, letters_file, EPOCHS)
        runs = [run for run in world.runs() if not run.name.startswith("{}-seed{}-".format(*WHOLE))]
        if index % 2:  # nobody has heard of the runs yet
            for path in (place / "home").glob("runs/*/published.json"):
                path.unlink()
            (place / "mlflow.db").unlink()
        done = []
        for run in rng.sample(runs, min(BATCH, count - index * BATCH)):
            parts = [path for path in map(run.folder.joinpath, PARTS) if path.exists()]
            done.append(f"{run.name}: {damage_file(rng.choice(parts), rng)}")
            if rng.random() < 0.2 and (run.folder / "end.json").is_file():
                (run.folder / "end.json").unlink()  # killed, as well
        names = [what.partition(":")[0] for what in done]
        return "; ".join(done), apart(world, record_case, world.uri, names, study_file, letters_file, expected)

    return tried(folder, cases, workers, trial)


# --- caches ----------------------------------------------------------------------------------------------------------


def cache_case(letters_file: Path, expected: list) -> Wrong:
    wrong: Wrong = []
    checked(wrong, "train", "--data", letters_file, "--epochs", EPOCHS, codes=(0,))
    if not wrong and figures_of(Path("home")) != expected:
        wrong.append("the training gave other figures")
    return wrong


def figures_of(home: Path) -> list:
    """Those of the only run in that home, without the times."""
    (path,) = home.glob("runs/*/record.json")
    records = RunRecord(path.parent).metrics()
    return [[(n, v) for n, v in r["metrics"].items() if n in FIGURES or n.startswith("test_")] for r in records]


def measure_caches(folder: Path, count: int, seed: int, workers: int) -> dict[str, object]:
    letters_file = letters(folder / "letters.npz", 300)
    template = World(folder / "whole", letters_file, EPOCHS)
    template.finish(template.command)
    expected = figures_of(template.folder / "home")
    shutil.rmtree(template.folder / "home" / "runs")

    def trial(place: Path, index: int) -> tuple[str, Wrong]:
        rng = random.Random(f"{seed} {index}")
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(template.folder, place)
        done = [damage_file(path, rng).partition(": ")[2] for path in (place / "home" / "features").iterdir()]
        return "; ".join(done), apart(World(place, letters_file, EPOCHS), cache_case, letters_file, expected)

    return tried(folder, -(-count // 3), workers, trial)  # one file a split


# --- study files -----------------------------------------------------------------------------------------------------


def damaged_study(rng: random.Random) -> tuple[str, bytes]:
    text = STUDY.format(epochs=EPOCHS)
    if rng.random() < 0.5:
        return damaged(text.encode(), rng)
    lines = text.splitlines()
    at = rng.choice([at for at, line in enumerate(lines) if " = " in line])
    values = ["9" * 5_000, "1e999", "nan", "-0.0", "[]", DEEP, "{}", "true", '"\\u001b[2J"', '"\\uD7FF"', "1979-05-27"]
    lines[at] = f"{lines[at].partition(' = ')[0]} = {rng.choice(values)}"
    return "another value", "\n".join(lines).encode()


def studies_case(contents: list[bytes], letters_file: Path) -> Wrong:
    wrong: Wrong = []
    for index, content in enumerate(contents):
        path = Path(f"{index}.toml")
        path.write_bytes(content)
        checked(wrong, "compare", "--study", path, "--data", letters_file, codes=(2,))  # there are no runs to compare
        try:
            study.read(path)
        except InputError:
            checked(wrong, "sweep", path, "--data", letters_file, codes=(2,))
    return wrong


def measure_studies(folder: Path, count: int, seed: int, workers: int) -> dict[str, object]:
    letters_file, batch = letters(folder / "letters.npz", 300), 10

    def trial(place: Path, index: int) -> tuple[str, Wrong]:
        rng = random.Random(f"{seed} {index}")
        contents = [damaged_study(rng)[1] for _ in range(batch)]
        return f"{batch} files", apart(World(place, letters_file, EPOCHS), studies_case, contents, letters_file)

    return tried(folder, -(-count // batch), workers, trial)


# --- images ----------------------------------------------------------------------------------------------------------

FORMATS = {"PNG": "png", "JPEG": "jpg", "GIF": "gif", "BMP": "bmp", "WEBP": "webp", "TIFF": "tif"}


def picture(rng: random.Random) -> tuple[str, bytes]:
    """A bright bar on black or the reverse, of any size and kind."""
    kind, mode = rng.choice(list(FORMATS)), rng.choice(("L", "RGB", "RGBA", "P", "1", "I;16", "CMYK"))
    size = (rng.choice((1, 28, 29, 300)), rng.choice((1, 28, 200)))
    drawn = Image.new("L", size, rng.choice((0, 255)))
    drawn.paste(128, (size[0] // 4, 0, size[0] // 2 + 1, size[1]))
    buffer = io.BytesIO()
    try:
        drawn.convert(mode).save(buffer, kind)
    except (OSError, ValueError, KeyError):  # a kind of file that has no such colours
        drawn.save(buffer, kind)
    return FORMATS[kind], buffer.getvalue()


def images_case(model: str, images: list[tuple[str, bytes]], whole: Path, expected: dict) -> Wrong:
    wrong: Wrong = []
    paths = [Path(f"{index}.{suffix}") for index, (suffix, _) in enumerate(images)]
    for path, (_, content) in zip(paths, images, strict=True):
        path.write_bytes(content)
    code, out, err = command("predict", model, *paths, whole, "--json")
    if code not in (0, 1) or "Traceback" in err:
        return [f"predict: exit {code}: {err[-600:]}"]
    said = {Path(each.pop("path")).name: each for each in json.loads(out)["predictions"]}
    named = [path for path in paths if path.name in said or f"{path}: " in err]
    if len(named) != len(paths) or (code == 1) != (len(said) <= len(paths)):
        wrong.append(f"{len(named)} of {len(paths)} images were named, exit {code}")
    if said[whole.name] | {"probability": 0, "runner_up_probability": 0} != expected:  # whose last digits vary
        wrong.append(f"the whole image beside them became {said[whole.name]}")
    if not all(each["letter"] in dataset.LETTERS and 0 < each["probability"] <= 1 for each in said.values()):
        wrong.append("a prediction that is none")
    return wrong


def measure_images(folder: Path, count: int, seed: int, workers: int) -> dict[str, object]:
    batch, whole = 20, folder / "whole.png"
    maker = World(folder / "maker", letters(folder / "letters.npz", 300), EPOCHS)
    maker.finish(maker.command)
    Image.fromarray(np.load(folder / "letters.npz")["X_test"][0]).save(whole)
    (expected,) = json.loads(maker.finish([*POOLNET, "predict", "models:/poolnet/1", str(whole), "--json"]))[
        "predictions"
    ]
    expected = {**expected, "probability": 0, "runner_up_probability": 0}
    del expected["path"]

    def trial(place: Path, index: int) -> tuple[str, Wrong]:
        rng = random.Random(f"{seed} {index}")
        images = []
        for _ in range(batch):
            suffix, content = picture(rng)
            images.append((suffix, damaged(content, rng)[1]))
        world = World(place, folder / "letters.npz", EPOCHS, maker.uri)
        return f"{batch} images", apart(world, images_case, "models:/poolnet/1", images, whole, expected)

    return tried(folder, -(-count // batch), workers, trial)


# --- archives of arrays ----------------------------------------------------------------------------------------------


def archive(rng: random.Random) -> tuple[str, bytes]:
    """A data set of some form that is read, whole or damaged; or with an array or a header that no data set has."""
    arrays = {}
    numbers = np.random.default_rng(rng.randrange(2**32))
    kind = rng.choice((np.uint8, np.float32, np.float64, ">f4"))
    for name, size in (("train", 30), ("val", 20), ("test", 10)):
        X = (numbers.integers(0, 2, (size, 28, 28)) * (255 if kind is np.uint8 else 1)).astype(kind)
        arrays[f"X_{name}"] = np.asfortranarray(X) if rng.random() < 0.2 else X if rng.random() < 0.5 else X[:, None]
        arrays[f"y_{name}"] = numbers.integers(0, 10, size).astype(rng.choice(("i8", "u1", ">i4")))
    fate, buffer = rng.choice(("whole", "damaged", "array", "header")), io.BytesIO()
    if fate == "array":
        few = [np.zeros(0), np.array(1), np.full(30, 10), np.full(30, -1), np.zeros(30), np.array([None] * 30)]
        many = [np.full((30, 28, 28), value) for value in (np.nan, 255.0, 1j, "A")]
        arrays[rng.choice(list(arrays))] = rng.choice([*few, *many])
    (np.savez_compressed if rng.random() < 0.3 else np.savez)(buffer, **arrays)
    content = buffer.getvalue()
    if fate == "header":
        rest = zipfile.ZipFile(buffer)
        key, changed = rng.choice(rest.namelist()), io.BytesIO()
        with zipfile.ZipFile(changed, "w") as new:
            for name in rest.namelist():
                new.writestr(name, other_header(rest.read(name), rng) if name == key else rest.read(name))
        content = changed.getvalue()
    return fate, damaged(content, rng)[1] if fate == "damaged" else content


def other_header(content: bytes, rng: random.Random) -> bytes:
    """The array behind a header that says something else."""
    stream = io.BytesIO(content)
    np.lib.format.read_magic(stream)
    shape, order, kind = np.lib.format.read_array_header_1_0(stream)
    about = {"descr": kind.str, "fortran_order": order, "shape": shape}
    about[rng.choice(list(about))] = rng.choice(
        [(True,), (-1, 28, 28), (2**62, 28, 28), (30, 0), (30.0,), "|O", "<U9", "|V784", ">f8", "<i1", [], "x" * 3_000]
    )
    text = repr(about).encode().ljust(300) if rng.random() < 0.9 else b"(" * 3_000
    return (
        b"\x93NUMPY" + bytes([rng.choice((1, 1, 1, 3, 9)), 0]) + len(text).to_bytes(2, "little") + text + stream.read()
    )


def arrays_case(archives: list[tuple[str, bytes]]) -> Wrong:
    wrong: Wrong = []
    path = Path("letters.npz")
    for index, (fate, content) in enumerate(archives):
        path.write_bytes(content)
        try:
            splits = dataset.open_dataset(path)
        except (InputError, RunError) as error:
            if fate == "whole":
                wrong.append(f"{index}: refused, though it is whole: {error}")
            continue
        except Exception:
            wrong.append(f"{index}: {traceback.format_exc()}")
            continue
        try:
            with np.load(path, allow_pickle=False) as arrays:
                for split in splits:
                    X, y = arrays[f"X_{split.name}"], arrays[f"y_{split.name}"]
                    assert np.array_equal(split.X, X.reshape(-1, 28, 28))
                    assert np.array_equal(split.y, y)
        except Exception as error:
            wrong.append(f"{index}: accepted, but NumPy finds something else: {error!r}")
    return wrong


def measure_arrays(folder: Path, count: int, seed: int, workers: int) -> dict[str, object]:
    batch = 50

    def trial(place: Path, index: int) -> tuple[str, Wrong]:
        rng = random.Random(f"{seed} {index}")
        archives = [archive(rng) for _ in range(batch)]
        return f"{batch} archives", apart(World(place, Path("letters.npz"), EPOCHS), arrays_case, archives)

    return tried(folder, -(-count // batch), workers, trial)


COUNT = click.IntRange(min=0)
MEASURES = {
    "records": measure_records,
    "caches": measure_caches,
    "studies": measure_studies,
    "images": measure_images,
    "arrays": measure_arrays,
}


@click.command()
@click.option("--records", type=COUNT, default=300, show_default=True, help="Records of runs, by tens.")
@click.option("--caches", type=COUNT, default=150, show_default=True, help="Files of cached features, by threes.")
@click.option("--studies", type=COUNT, default=50, show_default=True, help="Study files, by tens.")
@click.option("--images", type=COUNT, default=300, show_default=True, help="Pictures, by twenties.")
@click.option("--arrays", type=COUNT, default=1000, show_default=True, help="Data sets, by fifties.")
@click.option("--seed", default=0, show_default=True, help="Seed of the damage.")
@click.option("--workers", default=2, show_default=True, help="Cases at the same time.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(seed: int, workers: int, as_json: bool, **counts: int) -> None:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    result = {}
    with tempfile.TemporaryDirectory() as name:
        for kind, measure in MEASURES.items():
            folder = Path(name).resolve() / kind
            folder.mkdir()
            if counts[kind]:
                result[kind] = measure(folder, counts[kind], seed, workers)
    if as_json:
        click.echo(json.dumps({"seed": seed, **result}))
    else:
        for part, numbers in result.items():
            click.echo(f"{part}: {counts[part]} tried, {len(numbers['wrong'])} wrong")
    if wrong := sum(len(numbers["wrong"]) for numbers in result.values()):
        raise click.ClickException(f"wrong: {wrong}, see above")


if __name__ == "__main__":
    main()
