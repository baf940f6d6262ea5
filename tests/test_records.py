"""What PML's hook container records of HTL, the pictures in TensorBoard, and the warnings."""

import glob
import sqlite3
import sys
import warnings

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from pytorch_metric_learning import reducers
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.logging_presets import get_hook_container, get_record_keeper
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from pml_htl import ClassTree, DynamicMarginMiner, HierarchicalTripletLoss, plots
from pml_htl.losses import CrossBatchMemory

from . import oracle
from .training import NUM_CLASSES, make_dataset, make_htl, make_trainer

DATASET = make_dataset()
INPUTS, LABELS = DATASET.tensors


@pytest.fixture
def recorded(tmp_path):
    """Three epochs of 6 iterations, refreshed after every third, recorded every other iteration."""
    htl = make_htl(LABELS, collect_stats=True)
    keeper, _, writer = get_record_keeper(str(tmp_path / "records"), str(tmp_path / "tensorboard"))
    container = get_hook_container(keeper, log_freq=2)
    trees = {}

    def record(trainer):
        trees[trainer.get_global_iteration()] = htl.tree.nodes, htl.tree.average_spread
        container.end_of_iteration_hook(trainer)

    hook = htl.refresh_hook(
        DATASET, warmup_epochs=0, every_n_iterations=3, then_each_iteration=record, tensorboard_writer=writer,
        then=lambda trainer: keeper.save_records(),
    )  # fmt: skip
    loss = CrossBatchMemory(htl.loss, 8, 40)  # wrapped, as records must find what is inside
    trainer = make_trainer(
        htl, DATASET, hook, loss_funcs={"metric_loss": loss}, end_of_iteration_hook=hook.end_of_iteration_hook
    )
    trainer.train(num_epochs=3)
    writer.close()
    return tmp_path, trees


def test_records_of_loss_and_tree(recorded):
    folder, trees = recorded
    tables = {path.split("/")[-1]: pandas.read_csv(path) for path in glob.glob(str(folder / "records" / "*.csv"))}
    (of_loss,) = (table for name, table in tables.items() if name.endswith("HierarchicalTripletLoss.csv"))
    (of_tree,) = (table for name, table in tables.items() if name.endswith("ClassTree.csv"))
    assert len(of_loss) == len(of_tree) == 9
    assert of_loss.active_share.between(0, 1).all() and of_loss.active_share.nunique() > 3
    assert (of_loss.min_margin <= of_loss.margin + 1e-6).all() and (of_loss.margin <= of_loss.max_margin + 1e-6).all()
    assert [of_loss[name][0] for name in ("margin", "min_margin", "max_margin")] == pytest.approx([0.2] * 3)
    assert of_loss.min_margin.iloc[-1] < of_loss.max_margin.iloc[-1]

    iterations = of_tree["~iteration~"].tolist()
    fitted = [trees[iteration][0] is not None for iteration in iterations]
    assert fitted == [False] + [True] * 8  # within an epoch: the records need as many values before as after
    assert (of_tree.d_0 > 0).tolist() == (of_tree.refresh_seconds > 0).tolist() == fitted
    for row, iteration in enumerate(iterations):
        nodes, average_spread = trees[iteration]
        assert of_tree.d_0[row] == pytest.approx(0 if nodes is None else average_spread.item())
        for level in range(17):
            expected = 0 if nodes is None else len(nodes[:, level].unique())
            assert of_tree[f"nodes_at_level_{level}"][row] == expected


def test_the_tables_of_the_tree_stay_out_of_the_records(recorded):
    folder, _ = recorded
    tables = sqlite3.connect(folder / "records" / "logs.db").execute("SELECT name FROM sqlite_master").fetchall()
    names = {name for (name,) in tables}
    assert any(name.endswith("ClassTree") for name in names) and not any(
        "buffers" in name and "Tree" in name for name in names
    )


def test_tensorboard_has_the_numbers_and_a_picture_of_each_tree(recorded):
    folder, _ = recorded
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("class_tree")] == [3, 6, 9, 12, 15, 18]
    scalars = events.Tags()["scalars"]
    for name in ("active_share", "margin", "min_margin", "max_margin", "d_0", "nodes_at_level_0", "refresh_seconds"):
        assert any(tag.endswith(f"/{name}") for tag in scalars), name


def test_a_large_tree_is_drawn_in_part():
    class Writer:
        def add_figure(self, tag, figure, step):
            self.added = tag, figure.axes[0].get_title(), step

        def add_text(self, tag, text, step):
            self.text = tag, text, step

    labels = torch.arange(200).repeat_interleave(2)
    tree = ClassTree().fit_embeddings(torch.randn(400, 8, generator=torch.Generator().manual_seed(0)), labels)
    writer = Writer()
    plots.add_to_tensorboard(tree, writer, 7)
    assert writer.added[0] == "class_tree" and writer.added[1].startswith("60 of 200 classes") and writer.added[2] == 7
    tag, text, step = writer.text
    rows = [[float(cell) for cell in line.strip("| ").split(" | ")] for line in text.splitlines()[2:]]
    table = tree.confusable(20)
    assert (tag, step) == ("confusable_classes", 7) and len(rows) == 20
    assert [row[:2] for row in rows] == [[a, b] for a, b in zip(table["label_a"], table["label_b"], strict=True)]
    assert [row[2] for row in rows] == pytest.approx(table["ratio"].tolist(), abs=1e-3)


def test_a_sample_of_validation_is_in_the_projector(tmp_path):
    """At each refresh, at most 1,000 of it, as the trainer embeds them; PML's own visualizer works beside it."""
    htl, shown = make_htl(LABELS), []
    keeper, _, writer = get_record_keeper(str(tmp_path / "records"), str(tmp_path / "tensorboard"))
    container = get_hook_container(keeper, primary_metric="precision_at_1")

    class Visualizer:
        def fit_transform(self, embeddings):
            return embeddings[:, :2]

    def visualizer_hook(visualizer, points, labels, split, keyname, *rest):
        shown.append((split, points.shape, rest))

    tester = GlobalEmbeddingSpaceTester(
        end_of_testing_hook=container.end_of_testing_hook, visualizer=Visualizer(), visualizer_hook=visualizer_hook,
        dataloader_num_workers=0, accuracy_calculator=AccuracyCalculator(include=("precision_at_1",), k=1),
    )  # fmt: skip
    validation = torch.utils.data.TensorDataset(
        torch.randn(1500, INPUTS.shape[1], generator=torch.Generator().manual_seed(1)), torch.arange(1500) % 30 + 500
    )
    test = container.end_of_epoch_hook(tester, {"val": validation}, str(tmp_path / "models"))
    hook = htl.refresh_hook(DATASET, tensorboard_writer=writer, tensorboard_sample=validation, then=test)
    trainer = make_trainer(htl, DATASET, hook)
    trainer.train(num_epochs=2)
    writer.close()
    assert [(split, shape) for split, shape, _ in shown] == [("val", (1500, 2))] * 2
    steps = sorted(path.parents[1].name for path in (tmp_path / "tensorboard").glob("*/*/tensors.tsv"))
    assert steps == [str(step).zfill(5) for step in (trainer.iterations_per_epoch, 2 * trainer.iterations_per_epoch)]
    folder = next((tmp_path / "tensorboard").glob(f"{steps[-1]}/*"))
    points = np.loadtxt(folder / "tensors.tsv", delimiter="\t")
    places = np.linspace(0, 1499, 1000).round().astype(int)
    assert (folder / "metadata.tsv").read_text().split() == [str(500 + place % 30) for place in places]
    with torch.no_grad():
        for model in trainer.models.values():
            model.eval()
        expected = trainer.compute_embeddings(validation.tensors[0][places])
    assert np.allclose(points, expected.numpy(), atol=1e-4)
    text = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert any("confusable_classes" in tag for tag in text.Tags()["tensors"])


def test_images_stand_in_the_projector(tmp_path):
    """In a plain loop; streaming refreshes need the model for it."""
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10).repeat_interleave(4)
    dataset, model = torch.utils.data.TensorDataset(images, labels), torch.nn.Flatten()
    writer = SummaryWriter(str(tmp_path))
    htl = make_htl(labels)
    options = {"tensorboard_writer": writer, "tensorboard_sample": dataset}
    htl.refresh_hook(dataset, **options).refresh(model)
    sprite = next(tmp_path.glob("*/*/sprite.png"))
    with Image.open(sprite) as picture:
        assert picture.size == (7 * 48, 7 * 48)  # forty in a square
    streaming = htl.refresh_hook(None, mode="streaming", **options)
    with pytest.raises(ValueError, match='unless the refresh has mode="streaming" and no tensorboard_sample'):
        streaming.refresh()
    writer.close()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"tensorboard_writer": None}, ValueError, "give a tensorboard_writer as well"),
        ({"tensorboard_sample": 3}, TypeError, "tensorboard_sample must be a data set with a length, but it is 3"),
        ({"tensorboard_sample": []}, ValueError, "tensorboard_sample is empty"),
        ({"tensorboard_writer": object()}, TypeError, "tensorboard_writer must be a SummaryWriter"),
    ],
)
def test_what_cannot_go_to_tensorboard(options, error, message, tmp_path):
    given = {"tensorboard_writer": SummaryWriter(str(tmp_path)), "tensorboard_sample": DATASET, **options}
    with pytest.raises(error, match=message):
        make_htl(LABELS).refresh_hook(DATASET, **given)


def test_a_writer_without_matplotlib_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        make_htl(LABELS).refresh_hook(DATASET, tensorboard_writer=object())


@pytest.mark.parametrize("reducer", [None, reducers.DoNothingReducer()], ids=["sums", "list"])
def test_the_statistics_are_those_of_the_triplets(reducer):
    embeddings = oracle.unit(np.random.default_rng(0).normal(size=(30, 4)))
    labels = np.repeat(np.arange(6), [1, 9, 5, 5, 5, 5])
    tree = ClassTree(6).fit_embeddings(torch.from_numpy(embeddings), labels)
    miner = DynamicMarginMiner(tree)
    loss = HierarchicalTripletLoss(miner, reducer=reducer, collect_stats=True)
    loss(torch.from_numpy(embeddings), torch.from_numpy(labels))
    found = oracle.triplets(labels)
    margins = np.array([miner.margins(labels[a], labels[n]).item() for a, _, n in found])
    distance = [oracle.squared_distance(embeddings[a], embeddings[p]) - oracle.squared_distance(embeddings[a], embeddings[n])
                for a, p, n in found]  # fmt: skip
    assert loss.margin.item() == pytest.approx(margins.mean())
    assert (loss.min_margin, loss.max_margin) == pytest.approx((margins.min(), margins.max()))
    assert loss.active_share == pytest.approx(np.mean(distance + margins > 0))
    loss(torch.from_numpy(embeddings[:6]), torch.zeros(6, dtype=torch.int64))  # no triplets: the mean stays
    assert loss.margin.item() == pytest.approx(margins.mean())
    assert (loss.min_margin, loss.max_margin, loss.active_share) == (0, 0, 0)


# Warnings


def messages(caught):
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def test_collapsed_embeddings_are_told_once():
    tree, labels = ClassTree(), torch.arange(NUM_CLASSES).repeat_interleave(4)
    healthy = torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(0))
    collapsed = torch.ones(len(labels), 8) + 1e-4 * healthy
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tree.fit_embeddings(healthy, labels)
        assert messages(caught) == []
        for _ in range(3):
            tree.fit_embeddings(collapsed, labels)
    assert len(messages(caught)) == 1 and "collapsed" in messages(caught)[0]


@pytest.mark.parametrize("options", [{}, {"smooth_loss": False, "triplets_per_anchor": 1}], ids=["sums", "list"])
def test_batches_without_an_active_triplet_are_told_once(options):
    embeddings = torch.eye(4).repeat_interleave(3, dim=0)  # classes far apart
    labels = torch.arange(4).repeat_interleave(3)
    loss = HierarchicalTripletLoss(DynamicMarginMiner(ClassTree(), initial_margin=0.1), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(99):
            loss(embeddings, labels)
        loss(embeddings, labels.flip(0).roll(1))  # one batch with some
        for _ in range(99):
            loss(embeddings, labels)
        assert messages(caught) == []
        for _ in range(150):
            loss(embeddings, labels)
    assert len(messages(caught)) == 1 and "in the last 100 batches" in messages(caught)[0]


def test_batches_without_a_mined_triplet_count_as_idle():
    embeddings, labels = torch.eye(4).repeat_interleave(3, dim=0), torch.arange(4).repeat_interleave(3)
    miner = DynamicMarginMiner(ClassTree(), initial_margin=0.1, type_of_triplets="semihard")
    loss = HierarchicalTripletLoss(miner)
    with pytest.warns(UserWarning, match="no triplet has given a loss in the last 100 batches"):
        for _ in range(100):
            loss(embeddings, labels, miner(embeddings, labels))


def test_a_redundant_tuple_miner_is_told_once_and_no_other():
    embeddings, labels = torch.randn(24, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6).repeat(4)
    tree = ClassTree().fit_embeddings(embeddings, labels)
    miner, same = DynamicMarginMiner(tree), DynamicMarginMiner(tree)
    needed = [
        (miner, DynamicMarginMiner(tree, type_of_triplets="semihard"), {}),
        (miner, DynamicMarginMiner(tree, beta=0.2), {}),
        (miner, DynamicMarginMiner(ClassTree()), {}),
        (miner, same, {"smooth_loss": True}),
        (miner, same, {"swap": True}),
        (miner, same, {"triplets_per_anchor": 2}),
        (miner, same, {"reducer": reducers.MeanReducer()}),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for own, other, options in needed:
            HierarchicalTripletLoss(own, **options)(embeddings, labels, other(embeddings, labels))
        assert messages(caught) == []
        for tuple_miner in (miner, same):
            loss = HierarchicalTripletLoss(miner)
            mined = [loss(embeddings, labels, tuple_miner(embeddings, labels)) for _ in range(3)]
            torch.testing.assert_close(mined[0], loss(embeddings, labels))  # it says so because it is so
    assert len(messages(caught)) == 2 and all('type_of_triplets="all"' in message for message in messages(caught))
