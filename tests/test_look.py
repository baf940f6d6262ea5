"""`python -m benchmarks confusable`: the pairs of classes that a trained network tells apart least."""

import re

import pytest

from benchmarks.training.trained import network_of_run, plan_of_run

from .test_benchmarks import TINY, run_cli


@pytest.mark.slow
def test_pairs_of_a_training(tiny, tmp_path, capsys):
    assert run_cli("compare", *TINY, "--methods", "triplet", "--seeds", 0, "--output", tmp_path) == 0
    run = tmp_path / "runs" / "triplet-seed0"
    plan, name = plan_of_run(run)
    assert (name, plan.iterations, plan.embedding_size, plan.schedule) == ("tiny", 4, 16, "cosine")
    capsys.readouterr()
    assert run_cli("confusable", "--run", run, "--count", 3, "--output", tmp_path / "new" / "pairs.html") == 0
    out = capsys.readouterr().out
    page = (tmp_path / "new" / "pairs.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h2>(.*) and (.*)</h2>", page)
    assert len(headings) == 3 and {*sum(headings, ())} <= {*tiny.class_names[:20]}
    for first, second in headings:  # in the order of the page
        assert f"{first} and {second} " in out
    ratios = [float(ratio) for ratio in re.findall(r"Ratio ([\d.]+),", page)]
    assert ratios == sorted(ratios) and page.count("<img") == 3 * 2 * 6
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    assert run_cli("confusable", "--run", run, "--split", "test", "--output", tmp_path / "test.html") == 0
    assert "tiny, test, by" in capsys.readouterr().out
    # The network is that of the best epoch.
    for file in (run / "models").glob("embedder_best*.pth"):
        file.unlink()
    with pytest.raises(ValueError, match=r"should be one embedder_best\*\.pth"):
        network_of_run(run, plan, 1)


def test_what_cannot_be_looked_at(tiny, tmp_path, capsys):
    for arguments, message in [
        ([], "name a training of `compare` by --run, or a network by --network"),
        (["--run", tmp_path, "--network", "resnet50"], "name a training of `compare` by --run, or a network"),
        (["--run", tmp_path], "is no training of a comparison"),
        (["--network", "resnet50"], "a network needs data to look at: --data folder:PATH"),
        (["--network", "vgg", "--data", "tiny"], "network must be one of"),
        (["--network", "conv_net", "--data", "tiny"], "there are no weights for conv_net, but --weights is 'pretrained'"),
        (["--network", "resnet50", "--data", "tiny", "--split", "all"], "split must be train, val or test"),
        (["--network", "resnet50", "--data", "tiny", "--count", 0], "Invalid value for '--count'"),
    ]:
        assert run_cli("confusable", *arguments, "--output", tmp_path / "page.html") == 2
        assert message in " ".join("".join(capsys.readouterr()).split())
    assert not (tmp_path / "page.html").exists()
