"""What the READMEs say of the committed results, held to the numbers in them."""

import pytest

from benchmarks.outcomes import intervals, results, sampling, signs, study, twins

from .test_benchmarks import RESULTS


def test_the_tuned_results_are_fair():
    """As many trials for each method, its best settings trained with the same seeds, and nothing else different."""
    tuning, tuned = results.load(RESULTS / "study.json"), results.load(RESULTS / "tuned.json")
    assert {len(trials) for trials in tuning["studies"].values()} == {12}
    plans = (document["metadata"]["plan"] for document in (tuning, tuned))
    differing = {name for name, (short, full) in zip_values(*plans) if short != full}
    assert differing == {"iterations", "precision"} and tuning["metadata"]["plan"]["iterations"] >= 500
    seeds = {}
    for run in tuned["runs"]:
        assert run["settings"] == with_other_sampler(study.winners(tuning)[run["method"]], run)
        seeds.setdefault(run["label"], set()).add(run["seed"])
    whole = {method for method, found in seeds.items() if found == {0, 1, 2, 3, 4}}
    assert len(whole) == 18 and all(seeds[method] == {0, 1, 2} for method in seeds.keys() - whole)
    of_vectors = ("proxy-anchor", "soft-triple", "arcface", "normalized-softmax")
    assert seeds.keys() - whole == {"htl-paper:sampling=per-class", *(f"{name}-sampling" for name in of_vectors)}


def with_other_sampler(settings, run):
    """Those of the winner, but for the sampler where the run's title has another."""
    _, named, sampling_of_title = run["label"].partition(":sampling=")
    assert named or run["label"] == run["method"]
    return {**settings, "sampling": sampling_of_title} if named else settings


def zip_values(first, second):
    """Keys of both, and their values in each."""
    return [(key, (first.get(key), second.get(key))) for key in {*first, *second}]


def test_what_the_readme_says_of_the_tuned_results():
    """Of differences seed by seed, with their 95% intervals where it claims more than an order."""
    document = results.load(RESULTS / "tuned.json")
    values, behind = intervals.test_values(document), intervals.differences(document)
    for sampled, alone in (
        ("triplet-sampling", "triplet"), ("ntxent-sampling", "ntxent"),
        ("multi-similarity-sampling", "multi-similarity"), ("htl", "htl-margin"),
    ):  # fmt: skip
        gain = intervals.interval(values[sampled] - values[alone])
        assert gain.excludes_zero and gain.mean > 0.015
    ahead = behind["htl-constant"]  # the tree's margin does not pay
    assert ahead.excludes_zero and ahead.mean == pytest.approx(0.009, abs=0.0006)
    gains = sampling.gains(document)
    for title, least, most in (
        ("supcon", 0.015, 0.02),
        ("htl-paper:sampling=per-class", 0.04, 0.045),
        ("circle", 0.009, 0.0105),
    ):
        assert gains[title].excludes_zero and least < gains[title].mean < most
    for title in ("arcface", "normalized-softmax"):
        assert gains[title].excludes_zero and -0.04 < gains[title].mean < -0.025
    assert gains["proxy-anchor"].excludes_zero and gains["proxy-anchor"].mean == pytest.approx(-0.08, abs=0.005)
    assert not gains["soft-triple"].excludes_zero
    assert behind["htl-paper"].mean == pytest.approx(-0.03, abs=0.003)
    assert share_of_refreshes(document) == pytest.approx(0.2, abs=0.03)
    for ahead, back in (("htl-paper", "triplet"), ("triplet-sampling", "htl-paper")):
        lead = intervals.interval(values[ahead] - values[back])
        assert lead.excludes_zero and lead.mean > 0
    assert not behind["arcface"].excludes_zero
    for title, lead in (("normalized-softmax", -0.008), ("soft-triple", -0.015)):
        assert behind[title].excludes_zero and behind[title].mean == pytest.approx(lead, abs=0.0006)
    best_of_ours = intervals.interval(values["htl-constant"] - values["arcface"])
    assert best_of_ours.excludes_zero and best_of_ours.mean == pytest.approx(0.01, abs=0.0006)
    for title in ("triplet", "ntxent", "multi-similarity", "supcon", "circle", "proxy-anchor"):
        assert behind[title].excludes_zero and behind[title].mean < -0.02
    for name, least, most in (("tuned", 0.003, 0.007), ("hangul", 0.001, 0.005)):
        assert_level_at_equal_rates(name, least, most)
    best = values.mean().sort_values(ascending=False)
    of_pml = [title for title in best.index if not title.startswith("htl") and not title.endswith("-sampling")]
    assert {*of_pml[:3]} == {"arcface", "normalized-softmax", "soft-triple"}


def share_of_refreshes(document, title="htl"):
    """The seconds of refreshing the tree over those of training, mean over the seeds."""
    runs = [run for run in document["runs"] if results.title_of(run) == title and run["split"] == "test"]
    return sum(run["refresh_seconds"] / run["train_seconds"] for run in runs) / len(runs)


def assert_level_at_equal_rates(name, low, high):
    """A constant margin less the tree's, each with the learning rate of the other: what the README says, in points."""
    values = intervals.test_values(results.load(RESULTS / f"{name}.json"))
    swapped = results.load(RESULTS / f"{'glyphs' if name == 'tuned' else name}-rate.json")
    rates = intervals.test_values(swapped)
    by_method = {run["method"]: results.title_of(run) for run in swapped["runs"]}
    assert swapped["metadata"]["plan"] == results.load(RESULTS / f"{name}.json")["metadata"]["plan"]
    for difference, expected in (
        (rates[by_method["htl-constant"]] - values["htl"], low), (values["htl-constant"] - rates[by_method["htl"]], high),
    ):  # fmt: skip
        found = intervals.interval(difference.dropna())
        assert found.count == 3 and not found.excludes_zero and found.mean == pytest.approx(expected, abs=0.0006)


def test_what_the_readme_says_of_kanji_and_hangul():
    """The winners on glyphs, untouched: what sampling brings the triplet loss, the lead of htl, and that ArcFace's fail."""
    winners = study.winners(results.load(RESULTS / "study.json"))
    for name, methods, gain, lead, arcface in (
        ("kanji", 21, 0.041, 0.089, (0.6, 0.75)), ("hangul", 20, 0.226, 0.37, (0.0, 0.05)),
    ):  # fmt: skip
        document = results.load(RESULTS / f"{name}.json")
        assert all(run["settings"] == with_other_sampler(winners[run["method"]], run) for run in document["runs"])
        assert document["metadata"]["plan"]["samples_per_class"] == 6
        values = intervals.test_values(document)
        assert values.shape == (3, methods) and values.notna().all(axis=None)
        for ahead, back, expected in (
            ("triplet-sampling", "triplet", gain), ("htl", "triplet", lead), ("htl", "triplet-sampling", None),
            ("htl-constant", "triplet-sampling", None),
        ):  # fmt: skip
            found = intervals.interval(values[ahead] - values[back])
            assert found.excludes_zero and found.mean > 0
            assert expected is None or found.mean == pytest.approx(expected, abs=0.001)
        assert values["arcface"].between(*arcface).all()


def test_what_the_readme_says_of_kanji():
    """All methods: which are level, which fall behind with settings of glyphs, and whom sampling helps."""
    document = results.load(RESULTS / "kanji.json")
    values, behind = intervals.test_values(document), intervals.differences(document)
    for level in ("htl-constant", "circle"):
        assert not behind[level].excludes_zero and abs(behind[level].mean) < 0.005
    for title in ("triplet", "ntxent", "multi-similarity", "supcon", "proxy-anchor", "soft-triple", "normalized-softmax"):
        assert behind[title].excludes_zero and behind[title].mean < -0.019
    assert behind["proxy-anchor"].mean == pytest.approx(-0.30, abs=0.005)
    assert behind["arcface"].mean == pytest.approx(-0.09, abs=0.001) and not behind["arcface"].excludes_zero
    assert values["arcface"].max() - values["arcface"].min() == pytest.approx(0.07, abs=0.005)
    assert values.mean().idxmax() == "htl-margin" and not behind["htl-margin"].excludes_zero
    assert behind["htl-paper"].excludes_zero and behind["htl-paper"].mean < 0
    over_triplet = intervals.interval(values["htl-paper"] - values["triplet"])
    assert over_triplet.excludes_zero and over_triplet.mean > 0
    gains = sampling.gains(document)
    assert {title for title, gain in gains.items() if gain.excludes_zero} == {"triplet", "ntxent", "circle", "arcface"}
    for title, gain in (("ntxent", 0.02), ("circle", -0.07), ("arcface", -0.154)):
        assert gains[title].mean == pytest.approx(gain, abs=0.005)
    assert gains["normalized-softmax"].half > 0.1  # nothing can be told
    for title in ("supcon", "ntxent", "multi-similarity"):
        near = behind[f"{title}-sampling"]
        assert near.excludes_zero and -0.02 < near.mean < -0.01
    on_glyphs = intervals.differences(results.load(RESULTS / "tuned.json"))
    pairwise = [
        f"{title}{form}" for title in ("triplet", "ntxent", "multi-similarity", "supcon") for form in ("", "-sampling")
    ]
    for title in (*pairwise, "circle-sampling"):
        assert behind[title].mean == pytest.approx(on_glyphs[title].mean, abs=0.035)
    paper = intervals.interval(values["htl-paper"] - values["triplet-sampling"])
    assert not paper.excludes_zero and abs(paper.mean) < 0.005


def test_what_the_readme_says_of_tuning_on_kanji():
    """Equal budgets, the winners trained as with the settings of glyphs, and nothing gained that can be told from zero."""
    tuning, tuned = results.load(RESULTS / "study-kanji.json"), results.load(RESULTS / "kanji-tuned.json")
    of_glyphs = results.load(RESULTS / "kanji.json")
    assert {len(trials) for trials in tuning["studies"].values()} == {12}
    assert tuned["metadata"]["plan"] == of_glyphs["metadata"]["plan"]
    assert tuning["metadata"]["plan"] == {**tuned["metadata"]["plan"], "iterations": 500}
    assert all(run["settings"] == study.winners(tuning)[run["method"]] for run in tuned["runs"])
    values, before = intervals.test_values(tuned), intervals.test_values(of_glyphs)
    assert {*values} == {"htl", "arcface", "normalized-softmax", "proxy-anchor"}
    assert not any(intervals.interval(values[title] - before[title]).excludes_zero for title in values)
    assert all(lead.excludes_zero and lead.mean < -0.1 for lead in intervals.differences(tuned).values())


def test_what_the_readme_says_of_hangul():
    """What sampling brings each loss, and how far htl is ahead of PML's losses with either sampler."""
    document = results.load(RESULTS / "hangul.json")
    gains, behind = sampling.gains(document), intervals.differences(document)
    expected = {"triplet": 0.23, "htl-margin": 0.22, "htl-paper:sampling=per-class": 0.20, "ntxent": 0.16, "supcon": 0.16}
    expected |= {"multi-similarity": 0.07, "circle": -0.4}
    assert gains.keys() == expected.keys()
    for title, gain in gains.items():
        assert gain.excludes_zero and gain.mean == pytest.approx(expected[title], abs=0.005)
    of_pml = [title for title in behind if not title.startswith("htl") and ":" not in title]
    alone = {title: behind[title] for title in of_pml if not title.endswith("-sampling")}
    assert len(alone) == 9 and all(lead.excludes_zero for lead in behind.values())
    assert max(alone, key=lambda title: alone[title].mean) == "multi-similarity"
    assert behind["multi-similarity"].mean == pytest.approx(-0.18, abs=0.005)
    assert behind["supcon-sampling"].mean == max(behind[title].mean for title in of_pml) == pytest.approx(-0.04, abs=0.005)
    assert behind["ntxent-sampling"].mean == pytest.approx(-0.044, abs=0.005)
    assert behind["htl-constant"].mean == pytest.approx(0.012, abs=0.001)
    values = intervals.test_values(document)
    assert values[["arcface", "normalized-softmax", "proxy-anchor"]].max(axis=None) < 0.15
    assert share_of_refreshes(document) == pytest.approx(0.6, abs=0.03)
    assert behind["htl-paper"].mean == pytest.approx(-0.13, abs=0.005)
    assert all(behind[title].mean < -0.178 for title in alone)
    on_glyphs = intervals.differences(results.load(RESULTS / "tuned.json"))
    assert all(behind[title].mean < on_glyphs[title].mean for title in of_pml)
    over_triplet = intervals.interval(values["htl-paper"] - values["triplet"])
    assert over_triplet.excludes_zero and over_triplet.mean > 0
    assert values["soft-triple"].mean() == pytest.approx(0.32, abs=0.005)
    paper = intervals.interval(values["htl-paper"] - values["triplet-sampling"])
    assert not paper.excludes_zero and abs(paper.mean) < 0.015
    same = sampling.gains(results.load(RESULTS / "hangul-same.json"))  # all settings but the sampler
    assert same.keys() == {"htl:sampling=per-class", "ntxent"}
    assert values["circle:sampling=neighbors"].max() < values["circle-sampling"].min()
    for title, gain in (("htl:sampling=per-class", gains["htl-margin"]), ("ntxent", gains["ntxent"])):
        assert same[title].excludes_zero and same[title].mean == pytest.approx(gain.mean, abs=0.016)
    for name, ours, theirs in (("hangul-same", 0.72, 0.50), ("hangul-long", 0.90, 0.62)):
        means = intervals.test_values(results.load(RESULTS / f"{name}.json")).mean()
        assert means["htl"] == pytest.approx(ours, abs=0.006)
        assert means["htl:sampling=per-class"] == pytest.approx(theirs, abs=0.006)


def test_what_the_readme_says_of_refreshes_on_hangul():
    """Streaming is ahead and cheap; seldom refreshes are level. Seconds as shares of those of the training."""
    document = results.load(RESULTS / "hangul-same.json")
    behind = intervals.differences(document)
    assert behind["htl-streaming"].excludes_zero and behind["htl-streaming"].mean == pytest.approx(0.015, abs=0.001)
    assert not behind["htl:refresh_every=5"].excludes_zero
    for title, share in (("htl", 0.55), ("htl:refresh_every=5", 0.12), ("htl-streaming", 0.05)):
        assert share_of_refreshes(document, title) == pytest.approx(share, abs=0.006)


def test_what_the_readme_says_of_the_papers_form():
    """Against TripletMarginLoss without its sampler, and its margins against constant ones."""
    for name, ahead, told in (("tuned", -0.013, True), ("kanji", 0.031, True), ("hangul", 0.038, False)):
        values = intervals.test_values(results.load(RESULTS / f"{name}.json"))
        lead = intervals.interval((values["htl-paper:sampling=per-class"] - values["triplet"]).dropna())
        assert lead.mean == pytest.approx(ahead, abs=0.001) and lead.excludes_zero == told
    for name, whole, told in (("glyphs", "tuned", set()), ("hangul", "hangul", {"0.2"})):
        values, constant = (intervals.test_values(results.load(RESULTS / f"{n}.json")) for n in (whole, f"{name}-paper"))
        found = {
            title.rpartition("=")[2]: intervals.interval((values["htl-paper"] - constant[title]).dropna())
            for title in constant
        }
        assert found.keys() == {"0.2", "0.4"} and all(lead.count == 3 for lead in found.values())
        assert {beta for beta, lead in found.items() if lead.excludes_zero} == told
        assert not any(lead.excludes_zero and lead.mean > 0 for lead in found.values())
    assert found["0.2"].mean == pytest.approx(-0.0035, abs=0.0002)


def test_what_the_readme_says_of_other_anchors_and_neighbors():
    document = results.load(RESULTS / "anchors.json")
    values = intervals.test_values(document)
    assert document["metadata"]["plan"]["iterations"] == 2000 and values.shape == (3, 3)
    for variant in ("neighbors-ratio", "neighbors-hard"):
        assert not intervals.interval(values[f"htl-constant:sampling={variant}"] - values["htl-constant"]).excludes_zero


def test_what_the_readme_says_of_fewer_classes_and_more_samples():
    """The same plan and test: with 300 classes a small part of what the sampler brings on all, with 1,000 most of it."""
    whole = results.load(RESULTS / "hangul.json")["metadata"]
    found = {}
    for name, changes in (
        ("hangul-300", {"classes": 300}), ("hangul-1000", {"classes": 1000}),
        ("hangul-1000-27", {"classes": 1000, "samples_per_class": 27}),
    ):  # fmt: skip
        document = results.load(RESULTS / f"{name}.json")
        assert document["metadata"]["plan"] == {**whole["plan"], **changes}
        assert document["metadata"]["data"]["test_classes"] == whole["data"]["test_classes"]
        found[name] = sampling.gains(document)
        assert found[name].keys() == {"triplet", "htl:sampling=per-class"}
        assert all(gain.count == 3 for gain in found[name].values())
    assert not found["hangul-300"]["triplet"].excludes_zero
    assert found["hangul-300"]["htl:sampling=per-class"].excludes_zero
    assert found["hangul-300"]["htl:sampling=per-class"].mean == pytest.approx(0.03, abs=0.005)
    for name, smooth, triplet in (("hangul-1000", 0.20, 0.14), ("hangul-1000-27", 0.22, 0.19)):
        for title, gain in (("htl:sampling=per-class", smooth), ("triplet", triplet)):
            assert found[name][title].excludes_zero and found[name][title].mean == pytest.approx(gain, abs=0.006)

    document, whole = (results.load(RESULTS / f"{name}.json") for name in ("kanji-1000", "kanji"))
    assert document["metadata"]["plan"] == {**whole["metadata"]["plan"], "classes": 1000}
    few, many = (sampling.gains(one)["triplet"] for one in (document, whole))
    assert few.excludes_zero and 0.02 < few.mean < many.mean < 0.045


SIGNS_OF = ("tuned", "kanji", "hangul", "hangul-300", "hangul-1000", "hangul-1000-27", "kanji-1000")  # of the view nearness


def test_what_the_readme_says_of_what_tells_beforehand():
    """Across losses neither the first tree nor a quarter of a training orders the gains; validation at the end does."""
    table = signs.signs_and_gains([results.load(RESULTS / f"{name}.json") for name in SIGNS_OF])
    orders = signs.orders(table)
    correlations = orders["all"]
    assert max(abs(correlations[head]) for head in signs.FACTS) < 0.15
    assert correlations["val. at a half"] == pytest.approx(0.8, abs=0.05)
    assert correlations["val. at a quarter"] < 0.5 and correlations["val. at the end"] > 0.9
    for end, gain in zip(table["val. at the end"], table["gain"], strict=True):
        if end > 4.95:
            assert 14 < gain < 23
        elif end < -4:
            assert -40 < gain < -6.5
        else:
            assert -1.5 < end < 2.5 and -4 < gain < 7
    assert table[table["val. at the end"] > 4.95].what.str.startswith("hangul").all()
    # Within a loss the first tree does better than a quarter of a training.
    assert orders["htl"]["met at level 0 or 1"] == pytest.approx(0.94, abs=0.005)
    assert sum(table.method == "htl") == 6 and sum((table.method == "htl") & table.what.str.startswith("hangul")) == 4
    assert all(abs(orders[method]["val. at a quarter"]) < 0.1 for method in ("htl", "triplet-sampling"))


def test_what_the_readme_says_of_noise():
    """Our sampler's gain stays. Leaving out suspects is level with split classes, and costs with wrong labels."""
    margin, clean = "htl-constant", intervals.test_values(results.load(RESULTS / "noise.json"))
    for name, gain, (least, most) in (("noise", 0.064, (-0.005, 0.005)), ("noise-split", 0.060, (-0.005, 0.005)),
                                      ("noise-wrong", 0.059, (-0.01, -0.003))):  # fmt: skip
        values = intervals.test_values(results.load(RESULTS / f"{name}.json"))
        found = intervals.interval(values[margin] - values[f"{margin}:sampling=per-class"])
        assert found.mean == pytest.approx(gain, abs=0.0006) and found.excludes_zero
        lost = {
            title: intervals.interval(values[title] - clean[title]) for title in (margin, f"{margin}:sampling=per-class")
        }
        costs = {title for title, loss in lost.items() if loss.excludes_zero}
        assert costs == ({margin} if name == "noise-wrong" else set()) and all(loss.mean > -0.0125 for loss in lost.values())
        for variant in ("neighbors-apart", "neighbors-distinct"):
            change = intervals.interval(values[f"{margin}:sampling={variant}"] - values[margin])
            assert least < change.mean < most and change.excludes_zero == (name == "noise-wrong")


def test_what_the_readme_says_of_twins():
    """Means over the seeds of the recall of split classes, at the iterations and precisions that it names."""
    document = results.load(RESULTS / "twins.json")
    num_twins = twins.twins_of(document)
    assert num_twins == 56

    def recall(title, iterations, precision):
        curves = [dict(c["nearness"]["twins"]) for c in document["curves"] if results.title_of(c) == title]
        assert len(curves) == 3
        return sum(twins.recall_at(precision, curve[iterations], num_twins) for curve in curves) / 3

    assert recall("htl", 300, 0.5) > 0.94 and recall("htl", 2000, 0.5) > 0.98 and recall("htl-margin", 2000, 0.5) > 0.98
    assert recall("htl", 2000, 0.7) > 0.89 > 0.8 > recall("htl-margin", 2000, 0.7)
    assert 0.2 < recall("htl", 2000, 0.9) < 0.3
