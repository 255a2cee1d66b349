"""Families of fonts: by name, united with clones."""

import base64

import numpy as np
import pytest

from poolnet.data import families


def coded(name):
    return base64.b64encode(name if isinstance(name, bytes) else name.encode()).decode()


@pytest.mark.parametrize(
    ("family", "fonts"),
    {
        "futura": ["Futura-BoldItalic.otf", "Futura Md BT.ttf", "FuturaBT-ExtraBlackCondItalic.otf", "FuturaStd.pfb"],
        "avantgarde": ["AvantGardeITCbyBT-ExtraLightObl.otf", "ITCAvantGardeStd-BoldCn.otf", "AvantGardeLT-Demi.otf"],
        "century": ["Century 725 Condensed BT.ttf", "Century725BT-RomanCondensed.otf", "Century-Book.otf"],
        "arial": ["ArialMTStd-ExtraBoldIt.otf", "Arial.ttf", "ARIAL.TTF", "Arial Bold(1).ttf"],
        "anatole": ["Anatole Display SSi.ttf"],
        "gillsans": ["Gill Sans MT.ttf", "GillSansCE-Italic.otf"],
        "gill": ["Gill.ttf"],
        "catull": ["Catull (R) Mediu OsF.ttf"],
        "bold": ["Bold.ttf"],  # words of style alone are a family of their own
        "bolditalic": ["Bold Italic.otf"],
        "010100": ["01-01-00.ttf"],
        "шрифт": ["Шрифт Bold.ttf"],  # letters of any script
        "a": ["Ａ-Bold.ttf"],  # the wide A is the A
        "аrial": ["Аrial Bold.ttf"],  # a Cyrillic A is not
    }.items(),
)
def test_the_family_that_a_name_says(family, fonts):
    assert {families.name_family(font) for font in fonts} == {family}


def test_file_names_that_decode_and_those_that_do_not():
    for name in ("Arial.ttf", "a/b\\c.ttf", "a\nb.ttf", "\u202eevil.ttf", "x" * 300, "Ω"):
        assert families.font_of(coded(name)) == name
    for file in ("", "0-1", "Arial", coded(b"\xff\xfe\xfd"), coded("..."), coded("Arial.ttf")[:-1], "é", "\udcff"):
        assert families.font_of(file) is None


def letters(fonts, seed=0):
    """Ten random letters for each font; `fonts` maps names to a font that it looks like, or None."""
    rng = np.random.default_rng(seed)
    drawn, files, labels = {}, [], []
    for name, like in fonts.items():
        drawn[name] = rng.integers(0, 256, (10, 28, 28), dtype=np.uint8) if like is None else drawn[like]
        files += [name] * 10
        labels += range(10)
    return np.array(files, object), np.array(labels), np.concatenate(list(drawn.values()))


def find(files, labels, images):
    keys = np.array([image.tobytes()[:16] for image in images], "V16")
    return families.find(files, labels, [images[:7], images[7:]], keys)


def test_names_and_clones_are_united_and_nothing_else():
    fonts = {coded(name): None for name in ("Arial.ttf", "Arial Bold.ttf", "Times.ttf", "Bodoni.ttf")}
    fonts |= {coded("Fake.ttf"): coded("Times.ttf"), "not base64": None, "0-1": coded("Bodoni.ttf")}
    files, labels, images = letters(fonts)
    found = find(files, labels, images)
    assert found.names == ("?0-1", "?not base64", "arial", "fake")
    by_font = {families.font_of(file) or file: found.names[found.number[file]] for file in fonts}
    assert by_font["Arial Bold.ttf"] == by_font["Arial.ttf"] == "arial"
    assert by_font["Times.ttf"] == by_font["Fake.ttf"] == "fake"
    assert by_font["Bodoni.ttf"] == by_font["0-1"] == "?0-1"
    assert found.counts(files) == {
        "fonts": 7,
        "names that do not decode": 2,
        "families by name": 6,
        "clones united": 2,
    }
    shuffled = np.random.default_rng(1).permutation(len(files))
    again = find(files[shuffled], labels[shuffled], images[shuffled])
    assert (again.number, again.names) == (found.number, found.names)
    np.testing.assert_array_equal(again.of(files), found.of(files))


def test_above_a_number_of_fonts_names_alone_decide(monkeypatch):
    monkeypatch.setattr(families, "MOST", 1)
    files, labels, images = letters({coded("Times.ttf"): None, coded("Fake.ttf"): coded("Times.ttf")})
    found = find(files, labels, images)
    assert found.names == ("fake", "times")
    assert found.counts(files)["no clones sought above 1"] == 2


def reference(masters, present):
    """Compare each pair by the words of the rule."""
    pairs = set()
    for one in range(len(masters)):
        for other in range(one + 1, len(masters)):
            both = present[one] & present[other]
            if both.sum() >= families.COMMON:
                apart = (masters[one, both] / 255 - masters[other, both] / 255) ** 2
                if np.median(np.sqrt(apart.mean(1))) <= families.NEAR:
                    pairs.add((one, other))
    return pairs


def test_clones_are_those_of_the_slow_way(monkeypatch):
    monkeypatch.setattr(families, "BLOCK", 7)
    rng = np.random.default_rng(0)
    bases = rng.integers(40, 215, (8, 1, 9, 784))
    noise = rng.uniform(8, 24, (8, 5, 9, 1)) * rng.standard_normal((8, 5, 9, 784))
    masters = (bases + noise).clip(0, 255).astype(np.uint8).reshape(40, 9, 784)
    present = rng.random((40, 9)) < 0.7
    masters[~present] = 0
    expected = reference(masters, present)
    assert len(expected) > 10
    assert {tuple(map(int, pair)) for pair in families.clones(masters, present)} == expected


def test_at_exactly_a_tenth_fonts_are_clones():
    one = np.zeros((1, 9, 100), np.uint8)
    near, far = one.copy(), one.copy()
    near[:, :, :1] = 255  # one pixel of a hundred: the RMS distance is 0.1
    far[:, :, :1], far[:, :, 1:2] = 255, 8
    present = np.ones((2, 9), bool)
    assert families.clones(np.concatenate([one, near]), present).tolist() == [[0, 1]]
    assert families.clones(np.concatenate([one, far]), present).tolist() == []
