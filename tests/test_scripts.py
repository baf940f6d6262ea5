"""Kanji and hangul by the fonts that matplotlib ships, which have neither: letters stand in for them."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.ft2font import FT2Font

from benchmarks import data
from benchmarks.data import fonts, scripts
from benchmarks.data.rendering import legible, render_characters

FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
LETTERS = frozenset(map(ord, "abcdefghijklmnopqrstuvwxyzАБВГДЖ"))
LOOK_ALIKE = ord("А"), ord("A")  # Cyrillic and Latin
README = Path(__file__).parents[1] / "benchmarks" / "README.md"


@pytest.fixture
def letters(monkeypatch):
    """Twenty-six Latin and six Cyrillic letters as the script "kanji"."""
    monkeypatch.setitem(scripts.SCRIPTS, "kanji", replace(scripts.SCRIPTS["kanji"], characters=LETTERS, font_size=22))


def font_files(pattern="DejaVu*.ttf"):
    return sorted(FOLDER.glob(pattern))


def test_the_characters_of_the_standards():
    kanji = scripts.SCRIPTS["kanji"].characters
    assert len(kanji) == 6355 and {ord("亜"), ord("腕"), ord("弌"), ord("熙")} <= kanji  # first and last of both levels
    assert ord("あ") not in kanji and ord("々") not in kanji
    hangul = scripts.SCRIPTS["hangul"].characters
    assert len(hangul) == 11172 and {ord("가"), ord("힣")} <= hangul


def test_a_folder_of_fonts(letters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    splits = data.load(f"kanji:{FOLDER}")
    assert splits.name == f"kanji:{FOLDER}" and set(map(ord, splits.class_names)) == LETTERS
    sizes = splits.describe()
    assert (sizes["train_classes"], sizes["val_classes"], sizes["test_classes"]) == (13, 3, 16)
    assert (splits.val.labels.bincount()[13:] == scripts.VALIDATION_SAMPLES).all()
    for part in (splits.train, splits.test):
        assert part.labels.bincount()[part.labels.min() :].min() >= scripts.MIN_FONTS
        image, label = part[0]
        assert image.shape == (1, 32, 32) and image.dtype == torch.float32 and 0.5 < image.max() <= 1
        assert torch.equal(part.pictures_of(label)[0], image)
    assert len({image.numpy().tobytes() for image in splits.train.images}) == len(splits.train)


def test_rendered_once(tmp_path, monkeypatch):
    stem = tmp_path / "cache" / "letters"
    images, codes = scripts.cached_characters(LETTERS, font_files(), 22, stem)
    monkeypatch.setattr(scripts, "render_characters", None)  # it would fail
    again, codes_again = scripts.cached_characters(LETTERS, font_files(), 22, stem)
    assert torch.equal(again.images, images.images) and torch.equal(again.labels, images.labels) and codes == codes_again
    assert [chr(codes[label]) for label in (0, 25)] == ["a", "z"]
    assert [path.suffix for path in stem.parent.iterdir()] == [".pt"]
    monkeypatch.undo()
    fewer, _ = scripts.cached_characters(LETTERS, font_files()[1:], 22, stem)
    smaller, _ = scripts.cached_characters(LETTERS, font_files(), 20, stem)
    _, some = scripts.cached_characters(LETTERS - {ord("a")}, font_files(), 22, stem)
    assert len(fewer) < len(images) and not torch.equal(smaller.images, images.images) and ord("a") not in some
    assert len(list(stem.parent.iterdir())) == 4


def test_what_is_no_sample():
    """Blanks and look-alikes go from the fonts in which they are such, and classes with them that have too few left."""
    wanted = {ord("e"), ord("\N{NO-BREAK SPACE}"), *LOOK_ALIKE}.__contains__
    renderings = render_characters(font_files(), 22, wanted, 1)
    assert set(renderings) == {ord("e"), ord("\N{NO-BREAK SPACE}"), *LOOK_ALIKE}
    assert set(legible(renderings, 8)) == {ord("e")}
    # Ten fonts; 2 looks like 1 in two of them, and 4 like 3 in three, which leaves them too few.
    ten = {
        code: [(font, b"%d" % (code - 1 if font < alike else code)) for font in range(10)]
        for code, alike in ((1, 0), (2, 2), (3, 0), (4, 3))
    }
    assert legible(ten, 8) == {1: [b"1"] * 8, 2: [b"2"] * 8}


def test_boxes_for_missing_characters_are_no_samples():
    """A font that claims all of Unicode, and has a box for each block of it."""
    last_resort = FOLDER / "LastResortHE-Regular.ttf"
    assert LETTERS <= FT2Font(str(last_resort)).get_charmap().keys()
    with_it = legible(render_characters([*font_files(), last_resort], 22, LETTERS.__contains__, 1), 8)
    assert with_it == legible(render_characters(font_files(), 22, LETTERS.__contains__, 1), 8)


def test_fonts_by_their_packages(monkeypatch):
    files = [path.name for path in font_files()]
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [str(path) for path in reversed(font_files())])
    found = fonts.packaged_fonts("kanji", {"fonts-b": f"{files[2]} {files[0]}", "fonts-a": files[1]})
    assert [path.name for path in found] == [files[2], files[0], files[1]]
    lacking = {"fonts-a": files[0], "fonts-b": f"{files[1]} not-here.ttf", "fonts-c": "nor-this.ttf"}
    with pytest.raises(
        ValueError, match=r"3 Debian .* 2 are .* sudo apt-get install fonts-b fonts-c, .* --data kanji:FOLDER"
    ):
        fonts.packaged_fonts("kanji", lacking)


def test_folders_that_will_not_do(letters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there are no fonts .* in nowhere"):
        data.load("kanji:nowhere")
    os.mkdir("own")
    for path in font_files()[:7]:
        shutil.copy(path, "own")
    with pytest.raises(ValueError, match=r"4 characters of kanji that 8 fonts .* the 7 fonts given have 0: add fonts"):
        data.load("kanji:own")
    Path("own", "broken.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match=r"broken\.ttf cannot be read as a font"):
        data.load("kanji:own")
    assert not Path("data").exists()


@pytest.mark.parametrize("name", ["kanji", "hangul"])
def test_the_readme_installs_all_fonts(name):
    (line,) = re.findall(rf"^- {name}: `sudo ([^`]*)`$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert " ".join(line.split()) == fonts.install_line(list(scripts.SCRIPTS[name].packages))
