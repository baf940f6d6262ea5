import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pml_htl import ClassStatistics

from . import oracle
from .examples import labelled_embeddings

pytestmark = pytest.mark.numerical


@given(labelled_embeddings())
def test_distances_and_spreads_are_the_mean_over_all_pairs(example):
    embeddings, labels = example
    statistics = ClassStatistics(labels, embeddings.shape[1]).update(torch.from_numpy(embeddings), labels)
    spreads, average = oracle.spreads(embeddings, labels)
    distances = statistics.squared_distances().numpy()
    np.fill_diagonal(distances, 0)
    np.testing.assert_allclose(distances, oracle.class_distances(embeddings, labels), rtol=0, atol=1e-12)
    np.testing.assert_allclose(statistics.spreads, spreads, rtol=0, atol=1e-12)
    assert statistics.average_spread == pytest.approx(average, abs=1e-12)


@given(labelled_embeddings(kinds=["random"]), st.integers(0, 2**32 - 1))
def test_sums_do_not_depend_on_batches_order_or_norms(example, seed):
    embeddings, labels = example
    rng = np.random.default_rng(seed)
    whole = ClassStatistics(labels, embeddings.shape[1]).update(torch.from_numpy(embeddings), labels)
    parts = [ClassStatistics(np.unique(labels), embeddings.shape[1]) for _ in range(2)]
    scaled = embeddings * rng.uniform(0.1, 10, size=(len(labels), 1))
    for batch in np.array_split(rng.permutation(len(labels)), 3):
        parts[rng.integers(2)].update(torch.from_numpy(scaled[batch]), labels[batch])
    merged = parts[0].merge(parts[1])
    assert torch.equal(merged.counts, whole.counts)
    torch.testing.assert_close(merged.means, whole.means, rtol=0, atol=1e-12)
    torch.testing.assert_close(merged.spreads, whole.spreads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
def test_any_float_type_and_label_type(dtype, normalize):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(90, 16, generator=generator)).to(dtype)
    labels = torch.tensor([-7, 3, 10**12]).repeat(30)
    statistics = ClassStatistics(labels, 16, normalize=normalize).update(embeddings, labels)
    exact = embeddings.double().numpy()
    if normalize:
        exact = oracle.unit(exact)
    spreads, _ = oracle.spreads(exact, labels.numpy())
    assert statistics.labels.tolist() == [-7, 3, 10**12]
    np.testing.assert_allclose(statistics.spreads, spreads, atol=1e-6)
    for kind in (np.int32, np.uint8, np.uint64):
        assert ClassStatistics(np.array([3, 1, 3], dtype=kind), 2).labels.tolist() == [1, 3]


def test_class_sizes_that_differ_a_thousandfold():
    rng = np.random.default_rng(0)
    labels = np.repeat([5, 6], [3000, 3])
    embeddings = oracle.unit(rng.normal(size=(len(labels), 8)) + 3 * np.eye(8)[labels])
    statistics = ClassStatistics(labels, 8).update(torch.from_numpy(embeddings).float(), labels)
    big = embeddings[:3000]  # all pairs at once: the loops of the oracle would take minutes
    expected = ((big[:, None, :4] - big[None, :, :4]) ** 2).sum() + ((big[:, None, 4:] - big[None, :, 4:]) ** 2).sum()
    assert statistics.spreads[0].item() == pytest.approx(expected / (3000 * 2999), abs=1e-6)
    assert statistics.spreads[1].item() == pytest.approx(oracle.spreads(embeddings[3000:], labels[3000:])[1], abs=1e-6)
    cross = np.mean([((big - x) ** 2).sum(axis=1).mean() for x in embeddings[3000:]])
    assert statistics.squared_distances()[0, 1].item() == pytest.approx(cross, abs=1e-6)


def test_a_class_with_one_sample_gets_the_average_spread():
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    statistics = ClassStatistics([1, 1, 2], 2).update(embeddings, [1, 1, 2])
    assert statistics.spreads.tolist() == pytest.approx([2, 2])
    assert statistics.average_spread == pytest.approx(2)


def test_rows_of_the_distances():
    generator = torch.Generator().manual_seed(1)
    statistics = ClassStatistics(range(5), 3).update(torch.randn(20, 3, generator=generator), torch.arange(20) % 5)
    whole = statistics.squared_distances()
    torch.testing.assert_close(statistics.squared_distances(torch.tensor([4, 1])), whole[[4, 1]])
    torch.testing.assert_close(statistics.squared_distances(slice(1, 3)), whole[1:3])


def test_adding_classes_keeps_what_is_there():
    embeddings = torch.eye(3)[[0, 1, 2, 0]]
    grown = ClassStatistics([5], 3).add_classes([9, 5, 1])
    assert grown.labels.tolist() == [1, 5, 9]
    late = ClassStatistics([5], 3).update(embeddings[:2], [5, 5]).add_classes([1]).update(embeddings[2:], [1, 1])
    whole = ClassStatistics([1, 5], 3).update(embeddings, [5, 5, 1, 1])
    assert torch.equal(late.means, whole.means) and torch.equal(late.counts, whole.counts)


def state(statistics):
    return [statistics.counts.clone(), statistics._sums.clone(), statistics._squared_norms.clone()]


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (torch.ones(2, 3), [1, 4], "label 4 .*not among the 2 classes"),
        (torch.ones(2, 3), [1], "2 embeddings"),
        (torch.ones(2, 4), [1, 1], r"\(B, 3\)"),
        (torch.ones(6), [1, 1], r"\(B, 3\)"),
        (torch.tensor([[1.0, 0, 0], [torch.nan, 0, 0]]), [1, 2], "NaN or infinite .label 2"),
        (torch.tensor([[1.0, 0, 0], [torch.inf, 0, 0]]), [1, 2], "NaN or infinite"),
    ],
)
def test_a_bad_batch_is_refused_and_nothing_is_added(embeddings, labels, message):
    statistics = ClassStatistics([1, 2], 3).update(torch.ones(2, 3), [1, 2])
    before = state(statistics)
    with pytest.raises(ValueError, match=message):
        statistics.update(embeddings, labels)
    assert all(map(torch.equal, before, state(statistics)))


def test_other_bad_input():
    with pytest.raises(ValueError, match="empty"):
        ClassStatistics([], 3)
    with pytest.raises(TypeError, match="integers"):
        ClassStatistics([1.5], 3)
    with pytest.raises(TypeError, match="integers"):
        ClassStatistics(torch.tensor([True]), 3)
    with pytest.raises(ValueError, match="embedding_size"):
        ClassStatistics([1], 0)
    with pytest.raises(ValueError, match="int64"):
        ClassStatistics(np.array([2**63], dtype=np.uint64), 3)
    with pytest.raises(TypeError, match="floats"):
        ClassStatistics([1], 3).update(torch.ones(1, 3, dtype=torch.int64), [1])
    with pytest.raises(ValueError, match="norm 2"):
        ClassStatistics([1], 1, normalize=False).update(torch.tensor([[1.0], [2.0]]), [1, 1])
    with pytest.raises(ValueError, match="classes differ"):
        ClassStatistics([1], 3).merge(ClassStatistics([2], 3))
    with pytest.raises(ValueError, match="sizes differ"):
        ClassStatistics([1], 3).merge(ClassStatistics([1], 4))
