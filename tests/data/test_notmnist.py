import base64
import contextlib
import functools
import hashlib
import http.server
import io
import itertools
import os
import re
import tarfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_LETTERS, inside
from PIL import Image

from poolnet.data import downloads, folds, letter_files, notmnist, splits
from poolnet.data.dataset import locate, open_dataset
from poolnet.errors import InputError
from poolnet.files import home
from poolnet.text import WIDTH


def png(pixels, mode=None):
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 28, 28), dtype=np.uint8)


@functools.cache
def some_files(n=600, seed=0):
    """Name and content of `n` distinct readable letters; the top left pixel tells the label."""
    X = pictures(n, seed)
    X[:, 0, 0] = np.arange(n) % 10
    return [(f"set/{'ABCDEFGHIJ'[i % 10]}/{seed}-{i}.png", png(X[i])) for i in range(n)]


def tarball(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def folder(path, files):
    for name, content in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def assert_labels_fit(arrays):
    for name in ("train", "val", "test"):
        np.testing.assert_array_equal(arrays[f"X_{name}"][:, 0, 0], arrays[f"y_{name}"])


def test_unreadable_files_are_counted_and_shift_no_label(tmp_path):
    good = some_files()
    broken = bytearray(good[5][1])
    broken[60] ^= 0xFF  # in the compressed pixels
    bad = [
        ("set/A/empty.png", b""),
        ("set/B/text.png", b"not a picture"),
        ("set/C/cut.png", good[2][1][:300]),
        ("set/D/broken.png", bytes(broken)),
        ("set/E/large.png", png(np.zeros((64, 64), np.uint8))),
        ("set/F/huge.png", b"\x89PNG" + bytes(letter_files.MAX_FILE)),
        ("set/G/deep.png", png(np.zeros((28, 28), np.uint16))),
    ]
    mixed = [file for pair in zip(bad, good, strict=False) for file in pair] + good[len(bad) :]
    ignored = [("set/K/k.png", good[0][1]), ("set/A/notes.txt", b"text"), ("A.png", good[0][1])]
    arrays, counts = notmnist.prepare(None, tarball(tmp_path / "t.tar.gz", mixed + ignored), seed=1, split="image")
    assert counts["small"]["files"] == 607
    assert counts["small"]["unreadable or not 28x28, skipped"] == 7
    assert counts["small"]["read"] == 600
    assert counts["small"]["other files, left out"] == 3
    assert {name: len(arrays[f"y_{name}"]) for name in ("train", "val", "test")} == {
        "train": 480,
        "val": 60,
        "test": 60,
    }
    assert_labels_fit(arrays)


def test_repeats_and_conflicts_are_dropped(tmp_path):
    files = some_files()
    repeat = ("set/A/again.png", files[0][1])  # the same letter twice: one stays
    conflict = ("set/C/other-label.png", files[1][1])  # B as well as C: neither stays
    arrays, counts = notmnist.prepare(None, folder(tmp_path / "f", [*files, repeat, conflict]), seed=0)
    assert counts["small"]["exact repeats, dropped"] == 2
    assert counts["small"]["distinct images"] == 600
    assert counts["small"]["with conflicting labels, dropped"] == 1
    X = np.concatenate([arrays[f"X_{name}"] for name in ("train", "val", "test")])
    assert len(np.unique(X, axis=0)) == len(X) == 599
    assert_labels_fit(arrays)


def test_by_image_test_is_small_without_what_train_and_val_hold(tmp_path):
    large, small = some_files(600, seed=1), some_files(60, seed=2)
    shared = [(f"set/J/shared-{i}.png", large[i][1]) for i in range(4)]  # labelled J here, and still the same image
    arrays, counts = notmnist.prepare(
        tarball(tmp_path / "large.tar.gz", large), folder(tmp_path / "small", small + shared), seed=3, split="image"
    )
    assert [len(arrays[f"y_{name}"]) for name in ("train", "val", "test")] == [540, 60, 60]
    assert counts["small"]["also in train or val, dropped"] == 4
    assert_labels_fit(arrays)
    seen = {image.tobytes() for name in ("train", "val") for image in arrays[f"X_{name}"]}
    assert not any(image.tobytes() in seen for image in arrays["X_test"])


def named(font, letter, style="Regular"):
    return f"set/{letter}/{base64.b64encode(f'{font}-{style}.ttf'.encode()).decode()}.png"


@functools.cache
def fonts(numbers, seed=0, style="Regular"):
    """Ten letters of each of so many fonts."""
    X = pictures(10 * len(numbers), seed)
    X[:, 0, 0] = np.arange(len(X)) % 10
    return [
        (
            named(f"Font{'abcdefghij'[number // 10]}{'abcdefghij'[number % 10]}", "ABCDEFGHIJ"[i], style),
            png(X[10 * n + i]),
        )
        for n, number in enumerate(numbers)
        for i in range(10)
    ]


def groups(arrays, split):
    return {str(arrays["group_names"][number]) for number in arrays[f"group_{split}"]}


def test_by_group_train_and_val_lose_the_families_and_images_of_small(tmp_path):
    large, small = fonts(range(40), seed=1), fonts(range(35, 45), seed=2, style="Bold")
    shared = [(named("Another", "ABCDEFGHIJ"[i]), large[11 * i][1]) for i in range(5)]  # a family of its own
    arrays, counts = notmnist.prepare(
        tarball(tmp_path / "large.tar.gz", large), folder(tmp_path / "small", small + shared), seed=3
    )
    assert counts["large"]["of families in small, dropped"] == 50
    assert counts["large"]["images in small, dropped"] == 5
    assert counts["large"]["fonts"] == counts["large"]["families by name"] == 40
    assert len(arrays["y_test"]) == 105
    assert 29 <= len(arrays["y_val"]) <= 40  # a tenth of 345, in families of ten letters
    assert len(arrays["y_train"]) + len(arrays["y_val"]) == 345
    assert_labels_fit(arrays)
    apart = [groups(arrays, name) for name in ("train", "val", "test")]
    assert len(set.union(*apart)) == sum(map(len, apart)) == 46
    assert {"fontdf", "fontej", "another"} & apart[2] == {"fontdf", "another"}
    seen = {image.tobytes() for name in ("train", "val") for image in arrays[f"X_{name}"]}
    assert not any(image.tobytes() in seen for image in arrays["X_test"])


@pytest.mark.parametrize("split", ["group", "image"])
def test_of_files_with_one_image_the_first_by_name_is_kept(tmp_path, split):
    files = fonts(range(50))
    repeat = (named("Aaa", "D"), dict(files)[named("Fontdc", "D")])
    for name, order in (("a", [*files, repeat]), ("b", [repeat, *files[::-1]])):
        arrays, counts = notmnist.prepare(None, tarball(tmp_path / name, order), seed=0, split=split)
        assert counts["small"]["exact repeats, dropped"] == 1
        assert "aaa" in set.union(*(groups(arrays, part) for part in ("train", "val", "test")))


def test_one_family_alone_cannot_be_split_by_group(tmp_path):
    styles, one = ("Bold", "Italic", "Light", "Book", "Thin"), range(1, 2)
    files = [file for style in styles for file in fonts(one, len(style), style)]
    with pytest.raises(InputError, match=r"too few distinct letters, no A B C .* --split image does not ask for"):
        notmnist.prepare(None, folder(tmp_path, files), seed=0)


NASTY = [  # names of fonts, coded, or of files as they are
    "a/b\\..\\c.ttf", "line\nend.ttf", "\u202egnp.ttf", "x" * 180, "Bold.ttf", "\u0410rial.ttf", "\x1b[31mred.ttf",
    b"\xff\xfe no text", "not base64", "1234", "\u202e", "caf\u00e9",
]  # fmt: skip


def test_nastily_named_fonts_are_kept_and_shown_safely(tmp_path):
    X = pictures(10 * len(NASTY), seed=5)
    X[:, 0, 0] = np.arange(len(X)) % 10
    files = fonts(range(60))
    for n, name in enumerate(NASTY):
        content = name if isinstance(name, bytes) else name.encode()
        plain = name in ("not base64", "1234", "\u202e", "caf\u00e9")
        stem = name if plain else base64.urlsafe_b64encode(content).decode()
        files += [(f"set/{'ABCDEFGHIJ'[i]}/{stem}.png", png(X[10 * n + i])) for i in range(10)]
    arrays, counts = notmnist.prepare(None, tarball(tmp_path / "t.tar.gz", files), seed=1)
    assert counts["small"]["read"] == 10 * (60 + len(NASTY))
    assert sum(len(arrays[f"y_{name}"]) for name in ("train", "val", "test")) == 10 * (60 + len(NASTY))
    assert counts["small"]["fonts"] == counts["small"]["families by name"] == 60 + len(NASTY)
    assert counts["small"]["names that do not decode"] == 5
    assert all(name.isprintable() and 0 < len(name) <= 60 for name in map(str, arrays["group_names"]))
    assert_labels_fit(arrays)
    np.savez(tmp_path / "d.npz", **arrays)
    assert open_dataset(tmp_path / "d.npz").crossing == 0
    assert all(line.isprintable() for line in splits.table(arrays, counts).splitlines())


def test_the_result_depends_on_the_images_and_the_seed_only(tmp_path):
    files = some_files()
    by_tar, _ = notmnist.prepare(None, tarball(tmp_path / "t.tar.gz", files), seed=1)
    by_folder, _ = notmnist.prepare(None, folder(tmp_path / "f", files), seed=1)
    turned, _ = notmnist.prepare(None, tarball(tmp_path / "u.tar.gz", files[::-1]), seed=1)
    other, _ = notmnist.prepare(None, tmp_path / "f", seed=2)
    for key in by_tar:
        np.testing.assert_array_equal(by_tar[key], by_folder[key])
        np.testing.assert_array_equal(by_tar[key], turned[key])
    assert not np.array_equal(by_tar["X_train"], other["X_train"])


def test_other_modes_become_grey(tmp_path):
    X = pictures(600) // 128 * 255  # black and white survive every mode
    modes = itertools.cycle(["1", "LA", "P", "RGB", "RGBA"])
    files = [(f"{'ABCDEFGHIJ'[i % 10]}/{i}.png", png(X[i], next(modes))) for i in range(600)]
    arrays, _ = notmnist.prepare(None, folder(tmp_path, files), seed=0)
    expected = {image.tobytes() for image in X}
    assert {image.tobytes() for name in ("train", "val", "test") for image in arrays[f"X_{name}"]} == expected


def test_nothing_of_a_tarball_reaches_the_disk(tmp_path):
    evil = [("../../escaped/A/x.png", png(pictures(1)[0])), ("/tmp/absolute/A/y.png", png(pictures(1, 1)[0]))]
    folder = tmp_path / "some" / "where"
    folder.mkdir(parents=True)
    path = tarball(folder / "t.tar.gz", some_files() + evil)
    with tarfile.open(path.with_name("link.tar.gz"), "w:gz") as tar:
        for name, content in some_files():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("set/A/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    assert notmnist.prepare(None, path, seed=0)[1]["small"]["read"] == 602
    counts = notmnist.prepare(None, path.with_name("link.tar.gz"), seed=0)[1]["small"]
    assert counts["files"] == 600
    assert counts["links that lead nowhere, left out"] == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_sources_are_refused_by_name(tmp_path):
    path = tarball(tmp_path / "whole.tar.gz", some_files())
    cases = {
        "nowhere.tar.gz": (None, "nowhere.tar.gz: no such file, expected a notMNIST tarball, or a folder"),
        "cut.tar.gz": (path.read_bytes()[:-3000], "cut.tar.gz: not a whole tarball"),
        "text.tar.gz": (b"text", "text.tar.gz: not a whole tarball"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            notmnist.prepare(None, tmp_path / name, seed=0)
    (tmp_path / "empty" / "A").mkdir(parents=True)
    with pytest.raises(InputError, match="empty: found no readable letter"):
        notmnist.prepare(tmp_path / "empty", None, seed=0)
    with pytest.raises(InputError, match="too few distinct letters"):
        notmnist.prepare(None, folder(tmp_path / "one", some_files(1)), seed=0)


LINKS = pytest.mark.skipif(os.name == "nt", reason="Windows allows links to administrators only")


def links(path):
    """600 letters, 60 of them behind links to folders, and two more by a link that gives them another label."""
    folder(path, [(name.replace("set/C/", "raw/third/"), content) for name, content in some_files()])
    letter = path / "set"
    (letter / "C").symlink_to("../raw/C")  # a folder by a link to a link
    (path / "raw" / "C").symlink_to("third", target_is_directory=True)
    (letter / "D" / "again").symlink_to("..")  # leads back
    (letter / "A" / "other-label.png").symlink_to("../B/0-1.png")  # a B called A
    os.link(letter / "E" / "0-4.png", letter / "F" / "other-label.png")  # an E called F
    (letter / "G" / "broken.png").symlink_to("nothing.png")
    (letter / "G" / "self.png").symlink_to("self.png")
    (path / "more").mkdir()
    (path / "more" / "A").symlink_to(path / "gone")
    return path


@LINKS
@pytest.mark.parametrize("form", ["folder", "tarball", "tarball, turned round"])
def test_links_are_followed_and_those_that_lead_nowhere_counted(tmp_path, form):
    source = links(tmp_path / "f")
    if form != "folder":
        members = [
            source / "set" / "E",
            source / "set" / "F",
            *(path for path in source.iterdir() if path.name != "set"),
        ]
        members += [path for path in (source / "set").iterdir() if path not in members]
        with tarfile.open(tmp_path / "t.tar", "w") as tar:
            for path in members if form == "tarball" else members[:2] + members[:1:-1]:
                tar.add(path, f"./{path.relative_to(source)}")
        source = tmp_path / "t.tar"
    arrays, counts = notmnist.prepare(None, source, seed=0)
    assert counts["small"]["read"] == counts["small"]["files"] == 602
    assert counts["small"]["links that lead nowhere, left out"] == 3
    assert counts["small"]["with conflicting labels, dropped"] == 2
    assert counts["small"]["distinct images"] == 600
    assert sum(len(arrays[f"y_{name}"]) for name in ("train", "val", "test")) == 598
    assert_labels_fit(arrays)


def test_hidden_files_are_left_out(tmp_path):
    """As macOS, notebooks and synchronisation leave them."""
    good = some_files()
    conflict = good[1][1]
    hidden = [(name, conflict) for name in ("set/A/._0-0.png", "set/A/.ipynb_checkpoints/x.png", "set/.git/A/x.png")]
    hidden += [("__MACOSX/set/A/._0-0.png", b"resource"), (".Trash-0/A/y.png", conflict), ("set/.DS_Store", b"")]
    for number, source in enumerate(
        [folder(tmp_path / "f", good + hidden), tarball(tmp_path / "t.tar.gz", good + hidden)]
    ):
        _, counts = notmnist.prepare(None, source, seed=number)
        assert counts["small"]["files"] == counts["small"]["read"] == counts["small"]["distinct images"] == 600
        assert "other files, left out" not in counts["small"]


def on_transparent(X, modes):
    """Letters (n, 28, 28) that are in the transparency of PNG files, drawn in black or in white."""
    for image, mode in zip(X, modes, strict=True):
        if mode == "keyed":  # one grey of a picture without alpha is transparent
            buffer = io.BytesIO()
            Image.fromarray(np.where(image, 200, 3).astype(np.uint8)).save(buffer, "PNG", transparency=3)
        elif mode == "palette":
            buffer = io.BytesIO()
            palette = Image.fromarray((image > 0).astype(np.uint8)).convert("P")
            palette.putpalette([0, 0, 0, 255, 255, 255])
            palette.save(buffer, "PNG", transparency=bytes([0, 255]))
        else:
            colour = 0 if mode.startswith("black") else 255
            layers = [np.full_like(image, colour)] * (1 if mode.endswith("LA") else 3)
            buffer = io.BytesIO()
            Image.fromarray(np.dstack([*layers, image])).save(buffer, "PNG")
        yield buffer.getvalue()


def test_transparent_letters_are_laid_on_a_ground(tmp_path):
    X = pictures(600) // 128 * 255
    modes = 100 * ["black LA", "black RGBA", "white LA", "white RGBA", "keyed", "palette"]
    files = [(f"{'ABCDEFGHIJ'[i % 10]}/{i}.png", content) for i, content in enumerate(on_transparent(X, modes))]
    arrays, counts = notmnist.prepare(None, folder(tmp_path, files), seed=0)
    assert counts["small"]["exact repeats, dropped"] == 0
    expected = {
        (255 - image if "black" in mode else image // 255 * (200 if mode == "keyed" else 255)).tobytes()
        for image, mode in zip(X, modes, strict=True)
    }
    assert {image.tobytes() for name in ("train", "val", "test") for image in arrays[f"X_{name}"]} == expected


def without(letters, files, rest=0):
    """The files without those of some letters, but for so many of each."""
    kept = Counter()
    for name, content in files:
        letter = name.split("/")[1]
        kept[letter] += 1
        if letter not in letters or kept[letter] <= rest:
            yield name, content


def test_a_letter_that_is_missing_is_refused_and_one_that_is_rare_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"f: found too few distinct letters, no C in train, no C in val, no C in test, "
    ):
        notmnist.prepare(None, folder(tmp_path / "f", without("C", some_files())), seed=0)
    unreadable = [(name, content[:40] if "/J/" in name else content) for name, content in some_files()]
    with pytest.raises(
        InputError, match=r"no J in train, .* expected each of A to J in train, val and test \(60 unreadable"
    ):
        notmnist.prepare(None, folder(tmp_path / "g", unreadable), seed=0)
    arrays, _ = notmnist.prepare(
        folder(tmp_path / "large", without("DE", some_files(1200), rest=10)),
        folder(tmp_path / "small", some_files(600, seed=1)),
        seed=0,
    )
    lines = list(splits.scarce(arrays))
    assert [re.match(r"letter (.): found \d+ in train \(median \d+\)", line)[1] for line in lines] == ["D", "E"]
    assert list(splits.scarce(notmnist.prepare(None, tmp_path / "small", seed=0)[0])) == []


def test_a_damaged_tarball_is_refused_though_it_could_be_read(tmp_path):
    path = tarball(tmp_path / "t.tar.gz", some_files())
    whole = path.read_bytes()
    for where in (0.2, 0.8):
        content = bytearray(whole)
        content[int(where * len(content))] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"t.tar.gz: not a whole tarball"):
            notmnist.prepare(None, path, seed=0)


@pytest.mark.parametrize("mode", ["w", "w:bz2", "w:xz"])
def test_other_compressions_are_read_as_well(tmp_path, mode):
    path = tmp_path / "letters.tar"
    with tarfile.open(path, mode) as tar:
        tar.add(folder(tmp_path / "f", some_files()), "f")
    assert notmnist.prepare(None, path, seed=0)[1]["small"]["read"] == 600


def test_the_real_letters_are_counted_as_known(real_letters):
    path, printed = real_letters
    rows = dict(re.findall(r"^(\S.*?) {2,}([\d,]+)$", printed, re.MULTILINE))
    assert max(map(len, printed.partition("Wrote")[0].splitlines())) <= WIDTH
    assert rows["read"] == "18,724"
    assert rows["exact repeats, dropped"] == "492"
    assert rows["distinct images"] == "18,232"
    assert rows["with conflicting labels, dropped"] == "2"
    assert rows["fonts"] == "1,873"
    assert rows["names that do not decode"] == "0"
    assert rows["families by name"] == "1,310"
    assert rows["clones united"] == "91"
    assert "families: train 994, val 117, test 108\nsplits: train 14,523, val 1,884, test 1,823" in printed
    data = open_dataset(path)
    assert [len(split) for split in data] == [14_523, 1_884, 1_823]
    assert data.overlap == data.crossing == 0
    for k in range(1, 6):
        assert folds.take(data, f"{k}/5")[0].crossing == 0


def test_the_real_letters_split_by_image_are_those_of_before(real_letters):
    arrays, _ = notmnist.prepare(None, REAL_LETTERS, seed=42, split="image")
    X, y = (b"".join(arrays[f"{kind}_{name}"].tobytes() for name in ("train", "val", "test")) for kind in "Xy")
    assert hashlib.sha256(X + y).hexdigest() == "fad11a9ee10638309fcd07a01e305220a7b568341dbe8d7f4c80c305fbac60b8"
    assert [len(arrays[f"y_{name}"]) for name in ("train", "val", "test")] == [14_584, 1_823, 1_823]


# --- downloading -----------------------------------------------------------------------------------------------------

CONTENT = np.random.default_rng(0).bytes(300_000)
NAME = "notMNIST_small.tar.gz"


@contextlib.contextmanager
def mirror(content=CONTENT, cut_after=None):
    """A real server on loopback that may break off after so many bytes."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:cut_after])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def fetch(*mirrors):
    return downloads.download(NAME, mirrors, {NAME: len(CONTENT)})


def kept():
    return sorted(path.name for path in (home() / "downloads").glob("*"))


def test_a_download_is_kept_and_not_repeated():
    with mirror() as (url, requests):
        assert fetch(url).read_bytes() == CONTENT
        assert fetch(url).read_bytes() == CONTENT
    assert requests == [f"/{NAME}"]


def test_a_download_that_was_cut_is_tried_at_the_second_mirror():
    with mirror(cut_after=70_000) as (cut, _), mirror() as (good, requests):
        assert fetch(cut, good).read_bytes() == CONTENT
    assert requests == [f"/{NAME}"]
    assert kept() == [NAME]


@pytest.mark.parametrize(
    ("content", "cut_after", "found"),
    [(CONTENT + b"more", None, "300,004"), (CONTENT[:10], None, "10"), (CONTENT, 70_000, "70,000"), (b"", None, "0")],
)
def test_a_file_of_another_size_is_not_taken(content, cut_after, found):
    with mirror(content, cut_after) as (url, _), pytest.raises(InputError, match=f"found {found} bytes, expected"):
        fetch(url)
    assert kept() == []


def test_a_kept_file_of_another_size_is_downloaded_again():
    with mirror() as (url, _):
        fetch(url).write_bytes(CONTENT[:-1])
        assert fetch(url).read_bytes() == CONTENT


def test_a_disk_that_takes_no_more_is_not_the_mirrors_fault(monkeypatch):
    (home() / "downloads").write_text("where a folder should be")
    with mirror() as (url, _), pytest.raises(FileExistsError):
        fetch(url)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_a_pipe_or_device_as_source_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar.gz")
    for place, kind in ((tmp_path / "pipe.tar.gz", "a pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(InputError, match=f"{place}: found {kind}, expected a notMNIST tarball"):
            notmnist.prepare(None, place, seed=0)


def test_prepare_without_out_makes_what_data_notmnist_means(tmp_path):
    path = tarball(tmp_path / "t.tar.gz", some_files())
    for out in ([], ["--out", tmp_path / "small.npz"]):
        assert inside("prepare", "notmnist", "--small", path, *out).returncode == 0
    assert open_dataset(locate("notmnist")).sha256 == open_dataset(tmp_path / "small.npz").sha256


@pytest.mark.parametrize(("available", "workers"), [(1, 1), (2, 2), (64, 61), (200, 61)])
def test_as_many_workers_as_cores_that_may_be_used(monkeypatch, available, workers):
    numbers = []
    monkeypatch.setattr(letter_files, "cores", lambda: available)
    monkeypatch.setattr(
        letter_files.concurrent.futures,
        "ProcessPoolExecutor",
        lambda number: numbers.append(number) or letter_files.concurrent.futures.ThreadPoolExecutor(1),
    )
    assert list(letter_files._on_all_cores(str, [1, 2, 3])) == ["1", "2", "3"]
    assert numbers == [workers]


def test_offline_is_one_clear_line():
    with pytest.raises(InputError, match=f"{NAME}: could not be downloaded .*refused.* pass it with --small"):
        fetch("http://127.0.0.1:9/", "http://127.0.0.1:9/other/")
