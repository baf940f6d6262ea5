"""The field's data sets, on miniature copies of their real files, through the command line that the real ones use."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from benchmarks import data
from benchmarks.data.files import MEAN, STD, middle_crop, random_crop, to_tensor
from benchmarks.data.splits import fold
from benchmarks.outcomes import results, tables
from benchmarks.training.evaluation import METRICS, RecallCalculator
from benchmarks.training.networks import load_weights, make_network

from .miniature import MINIATURES, RECALL_AT, SIZE
from .test_benchmarks import run_cli

SHORT = ["--iterations", "2", "--epoch-iterations", "1", "--embedding-size", "16", "--seeds", "0", "--image-size", "16"]


@pytest.fixture(params=MINIATURES)
def copy(request, tmp_path):
    root = tmp_path / request.param
    MINIATURES[request.param](root)
    return request.param, root


def test_splits_and_labels(copy):
    name, root = copy
    splits = data.load(f"{name}:{root}", size=16)
    parts = [splits.train, splits.val, splits.test] + ([splits.gallery] if splits.gallery else [])
    classes = [set(part.labels.tolist()) for part in parts]
    num_train, num_val, num_test = (len(own) for own in classes[:3])
    assert classes[0] == set(range(num_train)) and classes[1] == set(range(num_train, num_train + num_val))
    assert classes[2] == set(range(num_train + num_val, num_train + num_val + num_test))
    assert num_val == round(0.2 * (num_train + num_val)) and num_test == (10 if name == "folder" else 6)
    assert list(splits.recall_at) == RECALL_AT[name]
    assert (splits.gallery is not None) == (name == "inshop")
    if splits.gallery:
        assert classes[3] == classes[2] and not set(splits.gallery.paths) & set(splits.test.paths)
    for part in parts:
        image, label = part[0]
        assert image.shape == (3, 16, 16) and image.dtype == torch.float32 and label == part.labels[0]
        for path, label in zip(part.paths, part.labels.tolist(), strict=True):  # names went with their classes
            assert splits.class_names[label].replace("/", "-") in path
    # A training image is cropped anew each time, but not as the others are evaluated.
    assert not all(torch.equal(splits.train[place][0], splits.train[place][0]) for place in range(5))
    evaluated = splits.train.evaluation()
    assert torch.equal(evaluated[0][0], evaluated[0][0]) and torch.equal(splits.val[0][0], splits.val[0][0])
    part = fold(splits, 1)
    assert len(part.train) + len(part.val) == len(splits.train) and part.train.is_training and not part.val.is_training
    assert {*part.train.paths, *part.val.paths} == {*splits.train.paths}
    assert data.load(f"{name}:{root}", size=16).train.paths == splits.train.paths  # the split never changes


@pytest.mark.slow
def test_it_trains_through_the_command_line(copy, tmp_path, capsys):
    name, root = copy
    batch = ["--batch-size", "16", "--methods", "htl:neighborhood_size=2,samples_per_class=2", "triplet:samples_per_class=2"]
    output = tmp_path / "out"
    assert run_cli("compare", "--data", f"{name}:{root}", *SHORT, *batch, "--output", output, "--freeze-batch-norm") == 0
    document = results.load(output / "results.json")
    assert document["metadata"]["plan"]["image_size"] == 16 and document["metadata"]["data"]["name"].startswith(name)
    for run in document["runs"]:
        recalls = list(run["recall"].values())
        assert [int(k) for k in run["recall"]] == RECALL_AT[name] and recalls == sorted(recalls)
        assert run["recall"]["1"] == run["precision_at_1"]
    heads = tables.markdown_table(document).splitlines()[0]
    assert all(f"R@{k}" in heads for k in RECALL_AT[name]) and "P@1" not in heads
    assert "R@" in capsys.readouterr().out and (output / "class_tree.png").exists()


@pytest.mark.parametrize("network", ["resnet50", "inception"])
def test_large_networks(network, tmp_path, capsys):
    MINIATURES["folder"](tmp_path / "images", num_classes=8)
    arguments = ["--data", f"folder:{tmp_path / 'images'}", "--image-size", 76, "--network", network]
    arguments += [
        "--embedding-size",
        512,
        "--iterations",
        1,
        "--epoch-iterations",
        1,
        "--seeds",
        0,
        "--precision",
        "bf16",
        "--freeze-batch-norm",
    ]
    arguments += ["--batch-size", 4, "--methods", "triplet:samples_per_class=2", "--output", tmp_path / "out"]
    code = run_cli("compare", *arguments)
    output = " ".join(capsys.readouterr().out.split())
    if not can_import_timm():
        assert code == 2 and f"{network} needs timm and a torchvision that fits torch" in output
        assert 'pip install ".[field]"' in output and not (tmp_path / "out").exists()
        return
    assert code == 0 and "test MAP@R" in output
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pt")
    for weights in ("nothing.pt", "other.pt"):
        assert run_cli("compare", *arguments, "--weights", tmp_path / weights, "--output", tmp_path / "other") == 2
        assert "there are no weights" in " ".join(capsys.readouterr().out.split())
    trunk, width = make_network(network, 3, seed=1)
    assert width == 2048 and (trunk.pretrained_cfg["mean"], trunk.pretrained_cfg["std"]) == (MEAN, STD)


def can_import_timm():
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError):  # the latter if torchvision does not fit torch
        return False
    return True


@pytest.mark.parametrize(
    "name, images",
    [
        ("cub", "CUB_200_2011/images/*"),
        ("cars", "car_data/car_data/*"),
        ("sop", "Stanford_Online_Products/*_final"),
        ("inaturalist", "train_val2018"),
        ("inshop", "Img/img"),
    ],
)
def test_lists_without_their_images_are_not_enough(name, images, tmp_path):
    MINIATURES[name](tmp_path)
    for folder in tmp_path.glob(images):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"there is no .*(jpg|JPG)\. Get .* and unpack it in .*Nothing is downloaded"):
        data.load(f"{name}:{tmp_path}")


def test_weights_of_a_file_are_all_there_or_refused(tmp_path):
    trunk, _ = make_network("conv_net", 3, seed=1)
    other, _ = make_network("conv_net", 3, seed=2)
    whole = {**other.state_dict(), "classifier.weight": torch.zeros(2, 2)}
    torch.save({name: value for name, value in whole.items() if "tracked" not in name}, tmp_path / "old.pt")
    load_weights(trunk, tmp_path / "old.pt")
    assert all(map(torch.equal, trunk.state_dict().values(), other.state_dict().values()))
    torch.save({f"module.{name}": value for name, value in whole.items()}, tmp_path / "wrapped.pt")
    with pytest.raises(RuntimeError, match=r"21 of its tensors are not in the file, such as 0\._extra_state"):
        load_weights(trunk, tmp_path / "wrapped.pt")


def test_what_is_missing_is_named_and_nothing_is_downloaded(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was downloaded")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("urllib.request.urlretrieve", refuse)
    for name, source in [
        ("cub", "CUB_200_2011.tgz from https://data.caltech.edu"),
        ("cars", "names.csv. Get the archive from https://www.kaggle.com"),
        ("sop", "Stanford_Online_Products.zip from https://drive"),
        ("inaturalist", "train_val2018.tar.gz from https://ml-inat"),
        ("inshop", "list_eval_partition.txt and img.zip"),
    ]:
        with pytest.raises(ValueError, match=source) as error:
            data.load(f"{name}:{tmp_path / name}")
        assert f"unpack it in {tmp_path / name}" in str(error.value) and "Nothing is downloaded" in str(error.value)
    with pytest.raises(ValueError, match=r"there is no data.cub.CUB_200_2011"):
        data.load("cub")
    with pytest.raises(ValueError, match="folder:PATH"):
        data.load("folder")
    (tmp_path / "few" / "one").mkdir(parents=True)
    with pytest.raises(ValueError, match="has 0 folders with images"):
        data.load(f"folder:{tmp_path / 'few'}")
    MINIATURES["inshop"](tmp_path / "inshop")
    table = tmp_path / "inshop" / "Eval" / "list_eval_partition.txt"
    table.write_text(table.read_text() + "img/a.jpg id_1 tomorrow\n")
    with pytest.raises(ValueError, match=r"not .*tomorrow"):
        data.load(f"inshop:{tmp_path / 'inshop'}")


def test_networks():
    trunk, width = make_network("conv_net", 3, seed=1)
    twin, _ = make_network("conv_net", 3, seed=1)
    assert trunk.eval()(torch.zeros(2, 3, 40, 40)).shape == (2, width)
    assert all(map(torch.equal, trunk.state_dict().values(), twin.state_dict().values()))
    with pytest.raises(ValueError, match="conv_net, strided_net, resnet50, inception, but it is 'vgg'"):
        make_network("vgg", 3, 0)
    with pytest.raises(ValueError, match="there are no weights for conv_net"):
        make_network("conv_net", 3, 0, "pretrained")


def test_crops():
    image = Image.fromarray(np.arange(SIZE[0] * SIZE[1] * 3, dtype=np.uint8).reshape(SIZE[1], SIZE[0], 3))
    assert to_tensor(image).shape == (3, SIZE[1], SIZE[0]) and float(to_tensor(image)[1, 0, 0]) == pytest.approx(1 / 255)
    assert middle_crop(image, 8).size == (8, 8)
    torch.manual_seed(0)
    crops = [random_crop(image, 8) for _ in range(20)]
    assert all(crop.size == (8, 8) for crop in crops) and len({crop.tobytes() for crop in crops}) == 20
    torch.manual_seed(0)
    assert random_crop(image, 8).tobytes() == crops[0].tobytes()
    white = Image.new("RGB", (3, 200), (255, 255, 255))
    assert all(float(to_tensor(random_crop(white, 8)).min()) == 1 for _ in range(20))  # never outside the image


@given(st.integers(0, 2**32 - 1), st.booleans(), st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True))
def test_recall_against_a_loop(seed, own_gallery, recall_at):
    rng = np.random.default_rng(seed)
    query, gallery = rng.normal(size=(2, 14, 3)).astype(np.float32)
    labels, gallery_labels = rng.integers(5, size=(2, 14))
    if own_gallery:
        gallery, gallery_labels = query, labels
    names = tuple(f"recall_at_{k}" for k in recall_at)
    calculator = RecallCalculator(tuple(recall_at), include=names, k=13, device=torch.device("cpu"))
    arrays = [torch.from_numpy(array) for array in (query, labels, gallery, gallery_labels)]
    found = calculator.get_accuracy(*arrays, ref_includes_query=own_gallery)
    for k in recall_at:
        hits = []
        for place in range(14):
            others = [other for other in range(14) if not own_gallery or other != place]
            if not any(gallery_labels[other] == labels[place] for other in others):
                continue  # nothing to be found
            nearest = sorted(others, key=lambda other: np.linalg.norm(query[place] - gallery[other]))[:k]
            hits.append(any(gallery_labels[other] == labels[place] for other in nearest))
        expected = np.mean(hits) if hits else np.nan
        assert found[f"recall_at_{k}"] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    "recall_at, counts, own_gallery, expected",
    [
        ((), (40, 3), True, 40),
        ((1, 100), (40, 3), True, 42),
        ((1, 100), (40, 3), False, 43),
        ((1, 100), (90, 60), True, 100),
    ],
)
def test_as_many_neighbors_as_there_are(recall_at, counts, own_gallery, expected):
    calculator = RecallCalculator(recall_at, device=torch.device("cpu"))
    assert calculator.determine_k(torch.tensor(counts), sum(counts), own_gallery) == expected


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_accuracies_are_those_of_pml(seed, own_gallery):
    """Also with classes of one sample, and queries without a match."""
    rng = np.random.default_rng(seed)
    query, gallery = torch.from_numpy(rng.normal(size=(2, 20, 3)).astype(np.float32))
    labels, gallery_labels = torch.from_numpy(rng.integers(8, size=(2, 20)))
    given = (query, labels) if own_gallery else (query, labels, gallery, gallery_labels)
    names = tuple(METRICS)
    ours = RecallCalculator((), include=names, device=torch.device("cpu")).get_accuracy(*given)
    theirs = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu")).get_accuracy(*given)
    assert ours == theirs


def test_map_at_r_of_a_class_larger_than_the_recalls():
    """MAP@R takes as many neighbours as a class has; those of one class alone are all of it."""
    embeddings, labels = torch.zeros(60, 2), torch.zeros(60, dtype=torch.int64)
    calculator = RecallCalculator((1, 8), include=("mean_average_precision_at_r", "recall_at_8"), device=torch.device("cpu"))
    found = calculator.get_accuracy(embeddings, labels)
    assert found == {"mean_average_precision_at_r": 1, "recall_at_8": 1}
