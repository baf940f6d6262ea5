"""The report: its statistics, and the page in a real browser."""

import copy
import json
import os
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.methods.contenders import METHODS, parse_contender
from benchmarks.outcomes import intervals, results, tables
from benchmarks.report import explorer, page, retrievals
from pml_htl import ClassTree
from tests.test_benchmarks import COMMITTED, RESULTS, run_cli

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TITLES = ("triplet", "triplet-sampling", "htl-constant", "htl-margin", "htl", "contrastive", "ntxent")
MEANS = dict(zip(TITLES, (0.60, 0.66, 0.70, 0.67, 0.72, 0.72, 0.71), strict=True))


@pytest.fixture(scope="module")
def document():
    """Five seeds that share their luck; contrastive is as good as htl, ntxent a little worse in every seed."""
    rng = np.random.default_rng(0)
    luck = dict(enumerate(rng.normal(size=5) * 0.01))
    made = {"metadata": json.loads((RESULTS / "tuned.json").read_text())["metadata"], "runs": [], "curves": []}
    for title in TITLES:
        for seed in range(5):
            noise = 0.004 * rng.normal() if title in ("contrastive", "triplet") else 0.0005 * rng.normal()
            value = MEANS[title] + luck[seed] + noise
            shared = {"method": title, "seed": seed, "settings": METHODS[title].defaults}
            run = {
                "iterations": 300,
                "precision_at_1": 0.9,
                "r_precision": 0.7,
                "train_seconds": 30.0,
                "refresh_seconds": 3.0,
            }
            for split in ("validation", "test"):
                made["runs"].append({**shared, **run, "split": split, "map_at_r": value})
            curve = [value - 0.2, value - 0.05, value]
            made["curves"].append(
                {**shared, "iterations": [100, 200, 300], "map_at_r": curve, "seconds": [11.0, 22.0, 33.0]}
            )
    results.validate(made)
    return made


@pytest.fixture(scope="module")
def tree(glyphs):
    embeddings = glyphs.train.images.flatten(1)[:, ::7] + 0.01
    fitted = ClassTree().fit_embeddings(embeddings, glyphs.train.labels)
    found = explorer.explorer_document(fitted, parse_contender("htl").margins_of(fitted), glyphs, "a <b>tree</b>")
    found["names"][3] = "<script>alert(1)</script>"
    return found


@pytest.fixture(scope="module")
def embeddings(glyphs):
    """Those of two methods: pixels, and a few of them."""
    pixels = glyphs.test.images.flatten(1).numpy() / 255
    return {"pixels": {"test": pixels}, "few": {"test": pixels[:, ::50] + 0.01}}


@pytest.fixture(scope="module")
def found(glyphs, embeddings):
    return retrievals.retrievals_document(embeddings, glyphs, "seed 0")


def test_intervals_are_those_of_scipy():
    values = np.random.default_rng(1).normal(size=7)
    found = intervals.interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.excludes_zero == (low > 0 or high < 0) and not intervals.interval([0.3]).excludes_zero
    assert np.isnan(intervals.interval([0.3]).half)


def test_differences_are_paired_by_seed(document):
    found = intervals.differences(document)
    values = {
        title: [run["map_at_r"] for run in document["runs"] if (run["method"], run["split"]) == (title, "test")]
        for title in TITLES
    }
    assert found.keys() == set(TITLES) - {"htl"}
    for title, gain in found.items():
        low, high = stats.ttest_rel(values[title], values["htl"]).confidence_interval(0.95)
        assert (gain.mean - gain.half, gain.mean + gain.half) == pytest.approx((low, high))
    # A run that is missing takes its pair with it.
    fewer = copy.deepcopy(document)
    fewer["runs"] = [run for run in fewer["runs"] if (run["method"], run["seed"]) != ("ntxent", 0)]
    expected = stats.ttest_rel(values["ntxent"][1:], values["htl"][1:]).statistic
    gain = intervals.differences(fewer)["ntxent"]
    assert gain.count == 4 and np.sign(gain.mean) == np.sign(expected)
    single = {**document, "runs": [run for run in document["runs"] if run["seed"] == 0]}
    assert intervals.differences(single) == {} and "vs htl" not in tables.markdown_table(single)


def test_the_words_say_what_the_intervals_say(document):
    words = page.in_words(document)
    (behind,) = (sentence for sentence in words if sentence.startswith("Behind htl"))
    (level,) = (sentence for sentence in words if sentence.startswith("Not to be told from htl"))
    assert "ntxent (-1." in behind and "triplet (" in behind and "contrastive" in level
    assert not any(sentence.startswith("Ahead") for sentence in words)


def test_two_by_two_and_times(document):
    grid = page.two_by_two(document)
    assert [name for name, *_ in grid] == [name for name, *_ in page.TWO_BY_TWO]
    values = intervals.test_values(document)
    assert grid[0][1] == intervals.with_interval(intervals.interval(values["triplet"])) and grid[1][1] == "-"
    assert grid[2][2] == intervals.with_interval(intervals.interval(values["htl"]))
    times = {title: (iterations, seconds) for title, iterations, seconds in page.times_to_reach(document)}
    assert times["triplet"] == ("300", "33 s") and times["htl"] == ("200", "22 s")
    slow = copy.deepcopy(document)
    for curve in slow["curves"]:
        if curve["method"] == "ntxent":
            curve["map_at_r"] = [0.1, 0.1, 0.1]
    assert dict((t, i) for t, i, _ in page.times_to_reach(slow))["ntxent"] == "not reached"


@pytest.mark.slow
def test_the_command(document, tree, tmp_path, capsys):
    for name, content in (("tuned.json", document), ("class_tree.json", tree), ("broken.json", {"merges": []})):
        (tmp_path / name).write_text(json.dumps(content))
    files = [tmp_path / "tuned.json", tmp_path / "class_tree.json", *COMMITTED]
    assert run_cli("report", *files, "--output", tmp_path / "out" / "report.html") == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)  # nothing from elsewhere
    assert "<script>alert" not in text and "&lt;b&gt;" not in tree["title"]
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert tables.markdown_table(document) in markdown and "| triplet | 300 | 33 s |" in markdown
    assert run_cli("report", tmp_path / "broken.json") == 2
    (tmp_path / "broken.json").write_text("{")
    assert run_cli("report", tmp_path / "broken.json") == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "lacks title" in out and "is no results file, class tree or retrievals" in out
    again = page.html(page.read(files))
    assert again == text  # the same files give the same page


def test_what_the_explorer_is_told(tree, glyphs):
    embeddings = glyphs.train.images.flatten(1)[:, ::7] + 0.01
    fitted = ClassTree().fit_embeddings(embeddings, glyphs.train.labels)
    miner = parse_contender("htl").margins_of(fitted)
    place = 17
    near, distances, levels, margins = tree["nearest"][place]
    assert torch.equal(torch.tensor(near).long(), fitted.nearest_classes[place, :8])
    for other, distance, level, margin in zip(near, distances, levels, margins, strict=True):
        pair = fitted.labels[place], fitted.labels[int(other)]
        assert distance == pytest.approx(float(fitted.cophenetic_distances(*pair)), abs=1e-4)
        assert level == fitted.merge_levels(*pair) and margin == pytest.approx(float(miner.margins(*pair)), abs=1e-4)
    assert len(json.dumps(tree)) < 600_000
    table = fitted.confusable(explorer.PAIRS)
    assert [pair[:2] for pair in tree["pairs"]] == [
        tuple(fitted.labels.tolist().index(row[k]) for k in (0, 1)) for row in table.tolist()
    ]
    assert [pair[2] for pair in tree["pairs"]] == pytest.approx(table["ratio"].tolist(), abs=1e-4)


def test_retrievals_are_those_of_a_loop(found, glyphs, embeddings):
    """Neighbours and average precision at R against scikit-learn, query by query."""
    labels = glyphs.test.labels.numpy()
    precision = {}
    places = retrievals.candidate_queries(glyphs.test).numpy()
    for method, own in embeddings.items():
        precisions, nearest = retrievals.of_candidates(own, glyphs)
        for candidate in range(0, len(places), 97):
            query = places[candidate]
            distances = ((own["test"].astype(np.float32) - own["test"][query].astype(np.float32)) ** 2).sum(axis=1)
            distances[query] = np.inf
            order = np.argsort(distances, kind="stable")
            assert np.allclose(distances[nearest[candidate]], distances[order[: retrievals.NEIGHBORS]], atol=1e-3)
            relevant = (labels == labels[query]).sum() - 1
            hits = labels[order[:relevant]] == labels[query]
            expected = sum(hits[: rank + 1].mean() for rank in range(relevant) if hits[rank]) / relevant
            if len(np.unique(np.round(distances[order[: relevant + 1]], 4))) == relevant + 1:  # no ties
                assert precisions[candidate] == pytest.approx(expected, abs=1e-6)
        precision[method] = precisions
    mean = (precision["pixels"] + precision["few"]) / 2
    chosen = retrievals.chosen_queries(mean, labels[places])
    assert [kind for kind, _ in chosen] == ["worst"] * 8 + ["random"] * 8
    assert len({labels[places[place]] for _, place in chosen}) == 16  # of as many classes
    assert mean[chosen[0][1]] == mean.min()


def test_what_the_page_is_told_of_retrievals(found, glyphs, embeddings):
    names = [name for _, name in found["pictures"]]
    assert len(set(map(tuple, found["pictures"]))) >= 0.9 * len(names)  # each once; some letters look the same
    for query in found["queries"]:
        assert query["neighbors"].keys() == {"pixels", "few"}
        for neighbors in query["neighbors"].values():
            assert len(neighbors) == 10
            assert all(right == (names[place] == names[query["picture"]]) for place, right in neighbors)
            assert query["picture"] not in [place for place, _ in neighbors]
    mapped = found["map"]
    assert len(mapped["pictures"]) == len(mapped["classes"]) <= retrievals.MAPPED
    assert max(np.bincount(mapped["classes"])) <= retrievals.MAPPED_PER_CLASS
    assert [mapped["names"][label] for label in mapped["classes"]] == [names[place] for place in mapped["pictures"]]
    for method in mapped["methods"].values():
        points = np.array(method["points"]["PCA"])
        assert points.shape == (len(mapped["pictures"]), 2) and points.min() == 0 and points.max() == retrievals.GRID
        assert all(len(nodes) == len(mapped["names"]) for nodes in method["nodes"]) and len(method["nodes"]) == 17
        counts = [len(set(nodes)) for nodes in method["nodes"]]
        assert counts == sorted(counts, reverse=True) and counts[-1] == 1
    assert retrievals.retrievals_document(embeddings, glyphs, "seed 0") == found
    for broken, message in (({"queries": []}, "lack title, data"), ({**found, "pictures": []}, "there are 0 pictures")):
        with pytest.raises(ValueError, match=message):
            retrievals.validate(broken)


def test_a_map_of_little():
    """One class, one image of each class, one dimension, one image: there are points, and no levels."""
    for labels, embeddings in (
        ([0, 0], np.eye(2)),
        ([0, 1], np.eye(2)),
        ([0, 0, 1], np.arange(3.0)[:, None]),
        ([0], np.ones((1, 4))),
    ):
        found = retrievals.map_of(embeddings, torch.tensor(labels))
        assert np.shape(found["points"]["PCA"]) == (len(labels), 2) and len(found["nodes"]) == len(found["thresholds"])
        assert len(found["nodes"]) == (17 if labels == [0, 0, 1] else 0)


def test_a_map_by_umap_of_enough_images(monkeypatch):
    """A stand-in for umap-learn, which compiles for a minute: it comes first, and of three images it would raise."""

    class Umap:
        def __init__(self, n_neighbors, random_state, n_jobs):
            self.n_neighbors = n_neighbors

        def fit_transform(self, points):
            assert len(points) > self.n_neighbors
            return points[:, :2]

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=Umap))
    points = np.random.default_rng(0).normal(size=(16, 4))
    labels = torch.arange(16) // 2
    found = retrievals.map_of(points, labels)["points"]
    assert list(found) == ["UMAP", "PCA"] and np.shape(found["UMAP"]) == (16, 2)
    assert list(retrievals.map_of(points[:15], labels[:15])["points"]) == ["PCA"]
    monkeypatch.setitem(sys.modules, "umap", None)
    assert list(retrievals.map_of(points, labels)["points"]) == ["PCA"]


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        message = "there is no Chromium: apt-get install chromium"
        if os.environ.get("PML_HTL_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, document, tree, found, tmp_path):
    """The page at 1,200 pixels; afterwards it must have said and asked for nothing."""
    path = tmp_path / "report.html"
    path.write_text(page.html(page.Files([("tuned", document)], [tree], [found])), encoding="utf-8")
    shown, complaints, requests = browser.new_page(viewport={"width": 1200, "height": 900}), [], []
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("request", lambda request: requests.append(request.url))
    shown.goto(path.as_uri())
    yield shown
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    shown.close()


@pytest.mark.slow
def test_ranking_and_charts_in_a_browser(opened, document):
    titles = opened.locator("#tuned table.sortable").first.locator("tbody tr td:first-child").all_text_contents()
    assert titles == list(results.summarize(document).title)
    assert opened.locator("#tuned figure svg").count() == 4
    for box in (figure.bounding_box() for figure in opened.locator("#tuned figure svg").all()):
        assert box["width"] > 400 and box["height"] > 150
    opened.locator("#tuned th button", has_text="method").first.click()
    sorted_titles = opened.locator("#tuned table.sortable").first.locator("tbody tr td:first-child").all_text_contents()
    assert sorted_titles == sorted(titles)
    opened.locator("#tuned summary").click()
    assert document["metadata"]["commit"] in opened.locator("#tuned dl").inner_text()


@pytest.mark.slow
def test_the_explorer_in_a_browser(opened, tree):
    card, canvas = opened.locator(".explorer .card"), opened.locator(".explorer canvas")
    name = tree["names"][40]
    opened.fill(".explorer input", name)
    assert card.locator("h3").inner_text().strip() == name
    near = [tree["names"][int(other)] for other in tree["nearest"][40][0]]
    assert [text.strip() for text in card.locator("tbody tr td:first-child").all_text_contents()] == near
    row = card.locator("tbody tr").first.locator("td").all_text_contents()
    assert row[1:] == [
        f"{tree['nearest'][40][1][0]:.3f}",
        str(int(tree["nearest"][40][2][0])),
        f"{tree['nearest'][40][3][0]:.3f}",
    ]
    shown = float(canvas.get_attribute("data-shown"))
    assert shown < len(tree["names"])  # the search has brought it near
    opened.locator(".explorer [data-zoom='0.5']").click()
    assert float(canvas.get_attribute("data-shown")) == pytest.approx(2 * shown)
    canvas.hover()
    opened.mouse.wheel(0, -100)
    assert float(canvas.get_attribute("data-shown")) == pytest.approx(2 * shown * 0.8)
    first = float(canvas.get_attribute("data-first"))
    canvas.press("ArrowDown")
    assert float(canvas.get_attribute("data-first")) > first
    card.locator("tbody button").first.click()
    assert card.locator("h3").inner_text().strip() == near[0]
    opened.locator(".explorer [data-zoom='0']").click()
    assert float(canvas.get_attribute("data-shown")) == len(tree["names"])
    canvas.click(position={"x": 200, "y": 300})
    assert card.locator("h3").inner_text().strip() != near[0]
    drawn = canvas.evaluate(
        "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
    )
    assert drawn > 5  # colours
    opened.fill(".explorer input", "<script>")
    assert card.locator("h3").inner_text().strip() == "<script>alert(1)</script>"


@pytest.mark.slow
def test_the_gallery_in_a_browser(opened, found):
    gallery = opened.locator(".retrievals")
    assert gallery.locator("details").count() == 16 and gallery.locator("details[open]").count() == 8
    first = gallery.locator("details").first
    names = [name for _, name in found["pictures"]]
    for row, method in zip(first.locator("tbody tr").all(), found["methods"], strict=True):
        expected = found["queries"][0]["neighbors"][method]
        assert row.locator("th").inner_text() == method
        alts = [image.get_attribute("alt") for image in row.locator("img").all()]
        assert alts == [f"{names[place]}, {'right' if right else 'wrong'}" for place, right in expected]
        assert row.locator("td").first.inner_text() == str(sum(right for _, right in expected))
    assert gallery.evaluate("g => [...g.querySelectorAll('img')].every((image) => image.src.startsWith('data:image/'))")
    last = gallery.locator("details").last
    last.locator("summary").press("Enter")  # by keyboard
    assert last.get_attribute("open") is not None and last.locator("tbody img").first.is_visible()


@pytest.mark.slow
def test_the_map_in_a_browser(opened, found):
    section, mapped = opened.locator(".map"), found["map"]
    canvas, card = section.locator("canvas"), section.locator(".card")
    assert canvas.get_attribute("data-inside") == str(len(mapped["pictures"]))
    canvas.focus()
    for key in ("+", "+", "+", "+"):
        canvas.press(key)
    assert int(canvas.get_attribute("data-inside")) < len(mapped["pictures"])
    x = float(canvas.get_attribute("data-x"))
    canvas.press("ArrowRight")
    assert float(canvas.get_attribute("data-x")) > x
    canvas.press("Enter")
    name = card.locator("h3").inner_text().strip()
    own = mapped["classes"].count(mapped["names"].index(name))
    assert f"{own} images of this class" in card.inner_text() and card.locator("p img").count() == own
    canvas.press("Escape")
    assert "No image is chosen" in card.inner_text()
    canvas.press("0")
    assert canvas.get_attribute("data-inside") == str(len(mapped["pictures"]))
    # The pointer shows what is there, a click chooses it.
    canvas.scroll_into_view_if_needed()
    section.locator("input").fill(mapped["names"][3])
    assert card.locator("h3").inner_text().strip() == mapped["names"][3]
    box = canvas.bounding_box()
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert section.locator(".tip").is_visible() and section.locator(".tip").inner_text().strip() in mapped["names"]
    opened.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert card.locator("h3").inner_text().strip() == section.locator(".tip").inner_text().strip()
    width = float(canvas.get_attribute("data-width"))
    opened.mouse.wheel(0, -100)
    opened.wait_for_function("width => Number(document.querySelector('.map canvas').dataset.width) < width", arg=width)
    # Another method, by nodes of a level at which some classes have met.
    section.locator("[data-choice=method]").select_option("few")
    choices = section.locator("[data-choice=color] option").all_text_contents()
    assert choices[0] == "class" and len(choices) > 1
    section.locator("[data-choice=color]").select_option(choices[1])
    section.locator("input").fill(mapped["names"][0])
    level = int(re.search(r"level (\d+)", choices[1])[1])
    nodes = mapped["methods"]["few"]["nodes"][level]
    together = [name for name, node in zip(mapped["names"], nodes, strict=True) if node == nodes[0]]
    text = card.inner_text()
    assert {*text.partition("In its node: ")[2].split(", ")} == {*together}


@pytest.mark.slow
def test_pairs_and_the_explorer_show_each_other(opened, tree):
    first, second, ratio, *_ = tree["pairs"][2]
    row = opened.locator(".confusable tbody tr").nth(2)
    assert row.locator("td").nth(2).inner_text() == f"{ratio:.2f}"
    row.locator("button").first.press("Enter")  # by keyboard
    card = opened.locator(".explorer .card")
    assert card.locator("h3").inner_text().strip() == tree["names"][first]
    assert opened.evaluate("document.activeElement.tagName") == "CANVAS"
    card.locator("button.pair", has_text="pair 3").click()
    assert opened.evaluate("document.activeElement.textContent").strip() == tree["names"][first]
    opened.locator(".confusable tbody tr").nth(2).locator("button").nth(1).click()
    assert card.locator("h3").inner_text().strip() == tree["names"][second]


@pytest.mark.slow
def test_a_picture_of_retrievals(found, tmp_path, capsys):
    path = tmp_path / "retrievals.json"
    path.write_text(json.dumps(found))
    assert run_cli("plot", path, tmp_path / "some.png", "--methods", "few", "--queries", 2) == 0
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
    assert run_cli("plot", path, tmp_path / "none.png", "--methods", "htl") == 2
    assert "there is no htl in it; there are pixels, few" in capsys.readouterr().out


@pytest.mark.slow
def test_on_a_narrow_screen(opened):
    opened.set_viewport_size({"width": 400, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") == 400
    opened.emulate_media(color_scheme="dark")
    background = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(20, 23, 27)"


def test_the_committed_tree_is_valid():
    explorer.validate(json.loads((RESULTS / "class_tree.json").read_text()))
