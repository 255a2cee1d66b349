import contextlib
import http.server
import io
import re
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from poolnet import notmnist
from poolnet.config import InputError
from poolnet.data import open_splits


def png(pixels, mode=None):
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 28, 28), dtype=np.uint8)


def some_files(n=60, seed=0):
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
        ("set/F/huge.png", b"\x89PNG" + bytes(notmnist.MAX_PNG)),
        ("set/G/deep.png", png(np.zeros((28, 28), np.uint16))),
    ]
    mixed = [file for pair in zip(bad, good, strict=False) for file in pair] + good[len(bad) :]
    ignored = [("set/K/k.png", good[0][1]), ("set/A/notes.txt", b"text"), ("A.png", good[0][1])]
    arrays, counts = notmnist.prepare(None, tarball(tmp_path / "t.tar.gz", mixed + ignored), seed=1)
    assert counts["small"]["files"] == 67
    assert counts["small"]["unreadable or not 28x28, skipped"] == 7
    assert counts["small"]["read"] == 60
    assert {name: len(arrays[f"y_{name}"]) for name in ("train", "val", "test")} == {"train": 48, "val": 6, "test": 6}
    assert_labels_fit(arrays)


def test_repeats_and_conflicts_are_dropped(tmp_path):
    files = some_files(40)
    repeat = ("set/A/again.png", files[0][1])  # the same letter twice: one stays
    conflict = ("set/C/other-label.png", files[1][1])  # B as well as C: neither stays
    arrays, counts = notmnist.prepare(None, folder(tmp_path / "f", [*files, repeat, conflict]), seed=0)
    assert counts["small"]["exact repeats, dropped"] == 2
    assert counts["small"]["distinct images"] == 40
    assert counts["small"]["with conflicting labels, dropped"] == 1
    X = np.concatenate([arrays[f"X_{name}"] for name in ("train", "val", "test")])
    assert len(np.unique(X, axis=0)) == len(X) == 39
    assert_labels_fit(arrays)


def test_large_is_split_nine_to_one_and_test_is_small_without_what_it_holds(tmp_path):
    large, small = some_files(100, seed=1), some_files(30, seed=2)
    shared = [(f"set/J/shared-{i}.png", large[i][1]) for i in range(4)]  # labelled J here, and still the same image
    arrays, counts = notmnist.prepare(
        tarball(tmp_path / "large.tar.gz", large), folder(tmp_path / "small", small + shared), seed=3
    )
    assert [len(arrays[f"y_{name}"]) for name in ("train", "val", "test")] == [90, 10, 30]
    assert counts["small"]["also in train or val, dropped"] == 4
    assert_labels_fit(arrays)
    seen = {image.tobytes() for name in ("train", "val") for image in arrays[f"X_{name}"]}
    assert not any(image.tobytes() in seen for image in arrays["X_test"])


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


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGB", "RGBA"])
def test_other_modes_become_grey(tmp_path, mode):
    X = pictures(30) // 128 * 255  # black and white survive every mode
    files = [(f"{'ABCDEFGHIJ'[i % 10]}/{i}.png", png(X[i], mode)) for i in range(30)]
    arrays, _ = notmnist.prepare(None, folder(tmp_path, files), seed=0)
    expected = {image.tobytes() for image in X}
    assert {image.tobytes() for name in ("train", "val", "test") for image in arrays[f"X_{name}"]} == expected


def test_nothing_of_a_tarball_reaches_the_disk(tmp_path):
    evil = [("../../escaped/A/x.png", png(pictures(1)[0])), ("/tmp/absolute/A/y.png", png(pictures(1, 1)[0]))]
    path = tarball(tmp_path / "t.tar.gz", some_files(30) + evil)
    with tarfile.open(path.with_name("link.tar.gz"), "w:gz") as tar:
        for name, content in some_files(30):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("set/A/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(tmp_path.parent.rglob("*"))
    assert notmnist.prepare(None, path, seed=0)[1]["small"]["read"] == 32
    assert notmnist.prepare(None, path.with_name("link.tar.gz"), seed=0)[1]["small"]["files"] == 30
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_bad_sources_are_refused_by_name(tmp_path):
    path = tarball(tmp_path / "whole.tar.gz", some_files())
    cases = {
        "nowhere.tar.gz": (None, "nowhere.tar.gz: no such file or folder"),
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


@pytest.mark.parametrize("where", [0.2, 0.5, 0.8])
def test_a_damaged_tarball_is_refused_though_it_could_be_read(tmp_path, where):
    path = tarball(tmp_path / "t.tar.gz", some_files())
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"t.tar.gz: not a whole tarball"):
        notmnist.prepare(None, path, seed=0)


@pytest.mark.parametrize("mode", ["w", "w:bz2", "w:xz"])
def test_other_compressions_are_read_as_well(tmp_path, mode):
    path = tmp_path / "letters.tar"
    with tarfile.open(path, mode) as tar:
        tar.add(folder(tmp_path / "f", some_files()), "f")
    assert notmnist.prepare(None, path, seed=0)[1]["small"]["read"] == 60


def test_the_real_letters_are_counted_as_known(real_letters):
    path, printed = real_letters
    rows = dict(re.findall(r"^(\S.*?) {2,}([\d,]+)$", printed, re.MULTILINE))
    assert rows["read"] == "18,724"
    assert rows["exact repeats, dropped"] == "492"
    assert rows["distinct images"] == "18,232"
    assert rows["with conflicting labels, dropped"] == "2"
    assert "splits: train 14,584, val 1,823, test 1,823" in printed
    splits = open_splits(path)
    assert [len(split) for split in splits] == [14_584, 1_823, 1_823]
    assert splits.overlap == 0


# --- downloading -----------------------------------------------------------------------------------------------------

CONTENT = np.random.default_rng(0).bytes(300_000)
NAME = "notMNIST_small.tar.gz"


@contextlib.contextmanager
def mirror(content=CONTENT, cut_after=None, ranges=True):
    """A real server on loopback that may break off after so many bytes, and may not know ranges."""
    starts = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1]) if ranges else 0
            starts.append(start)
            body = content[start:]
            self.send_response(206 if ranges else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:cut_after])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", starts
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def fetch(*mirrors):
    return notmnist.download(NAME, mirrors, {NAME: len(CONTENT)})


def test_a_download_is_kept_and_not_repeated():
    with mirror() as (url, starts):
        assert fetch(url).read_bytes() == CONTENT
        assert fetch(url).read_bytes() == CONTENT
    assert starts == [0]


def test_a_download_that_was_cut_goes_on_where_it_was():
    with mirror(cut_after=70_000) as (url, starts):
        assert fetch(url).read_bytes() == CONTENT
    assert starts == [0, 70_000, 140_000, 210_000, 280_000]


def test_a_later_command_goes_on_too_and_at_another_mirror():
    with mirror(cut_after=10_000) as (slow, _), pytest.raises(InputError, match="ended at 60,000 of 300,000 bytes"):
        fetch(slow)
    with mirror() as (good, starts):
        assert fetch("http://127.0.0.1:9/", good).read_bytes() == CONTENT
    assert starts == [60_000]


def test_a_server_without_ranges_starts_over(tmp_path):
    part = tmp_path / "home" / "downloads" / f"{NAME}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"an old beginning")
    with mirror(ranges=False) as (url, _):
        assert fetch(url).read_bytes() == CONTENT


def test_a_file_of_another_size_is_not_taken():
    with mirror(content=CONTENT + b"more") as (url, _), pytest.raises(InputError, match="found 300,004 bytes"):
        fetch(url)


def test_offline_is_one_clear_line():
    with pytest.raises(InputError, match=f"{NAME}: could not be downloaded .*refused.* pass it with --small"):
        fetch("http://127.0.0.1:9/", "http://127.0.0.1:9/other/")
