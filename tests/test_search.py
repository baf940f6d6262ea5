"""The search for the nearest classes on a CPU: its lists, its bounds, and what it leaves out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pml_htl.distributed import Ranks
from pml_htl.tree import coarse, halves, nearest
from pml_htl.tree.coarse import CoarseGroups, group_of_each
from pml_htl.tree.points import ClassPoints, class_points
from pml_htl.tree.shortlists import Shortlists

from .test_scale import clustered_statistics, many_classes, statistics_of_classes

pytestmark = pytest.mark.numerical

CPU = torch.device("cpu")


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**32 - 1), st.booleans())
def test_shortlists_hold_the_best_of_what_they_were_offered(k, num_rows, seed, with_ties):
    """Blocks of some rows and columns come in any order, as they lie in memory or transposed, and are cut now and then."""
    rng = np.random.default_rng(seed)
    lists, offered = Shortlists(num_rows, k), [{} for _ in range(num_rows)]
    next_owner = 0
    for _ in range(rng.integers(1, 12)):
        rows = np.sort(rng.choice(num_rows, rng.integers(1, num_rows + 1), replace=False))
        owners = next_owner + rng.permutation(rng.integers(1, 8 * k))
        next_owner += len(owners)
        scores = rng.normal(size=(len(rows), len(owners))).astype(np.float32)
        scores = np.round(scores) if with_ties else scores
        for row, values in zip(rows, scores, strict=True):
            offered[row] |= dict(zip(owners.tolist(), values.tolist(), strict=True))
        lists.offer(rows, scores if rng.random() < 0.5 else np.ascontiguousarray(scores.T).T, owners)
        if rng.random() < 0.2:
            lists.cut(rows)
        best = [sorted(own.values(), reverse=True)[k - 1] if len(own) >= k else -np.inf for own in offered]
        assert (lists.reach <= best).all()
    found, scores = lists.best()
    for row, own in enumerate(offered):
        expected = sorted(own.values(), reverse=True)[:k]
        assert scores[row, : len(expected)].tolist() == expected and (scores[row, len(expected) :] == -np.inf).all()
        names = found[row, : len(expected)].tolist()
        assert len(set(names)) == len(names) and [own[name] for name in names] == expected
    assert (lists.reach == scores[:, -1]).all()


def test_a_list_that_is_cleared_knows_how_good_one_has_to_be():
    lists = Shortlists(2, 2)
    lists.offer(np.arange(2), np.float32([[3, 1, 2], [6, 5, 4]]), np.arange(3))
    lists.cut(np.arange(2))
    lists.clear()
    lists.offer(np.arange(2), np.float32([[2, 2.5], [7, 5]]), np.array([8, 9]))
    found, scores = lists.best()
    assert scores.tolist() == [[2.5, -np.inf], [7, -np.inf]] and found[:, 0].tolist() == [9, 8]
    assert lists.reach.tolist() == [2, 5]


@given(statistics_of_classes(), st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_no_score_that_matters_is_above_its_bound(statistics, group, tile, seed):
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coarse, "GROUP", group)
        patch.setattr(coarse, "TILE", tile)
        points = class_points(statistics, CPU)
        of_each = group_of_each(points.means.numpy(), rng)
        order = np.argsort(of_each, kind="stable")
        points = points.take(torch.from_numpy(order))
        groups = CoarseGroups(points.means, of_each[order], points.offsets)
    scores = (points.queries.double() @ points.base.double().T).numpy()
    # Each class is in one tile, and in one of its groups.
    members = [np.arange(len(scores))[groups.members(tile)] for tile in groups.tiles]
    assert np.concatenate(members).tolist() == list(range(len(scores))) and max(map(len, members)) <= tile
    reach = np.quantile(scores, rng.random(), axis=1).astype(np.float32)
    for some in groups.tiles:
        may_reach = groups.may_reach(some, reach)
        after = groups.members(some).stop
        assert may_reach.shape == (len(scores) - after, some.stop - some.start)
        for number in range(some.start, some.stop):
            inside = groups.members(slice(number, number + 1))
            matters = scores[after:, inside] > np.minimum(reach[after:, np.newaxis], reach[inside])
            assert (may_reach[:, number - some.start] | ~matters.any(axis=1)).all()


def scores_computed(points, k, monkeypatch):
    """How many scores the search computes, of those of a whole product; with the lists."""
    computed = []

    def note(points, rows, columns):
        computed.append(len(rows) * len(columns))
        return scores(points, rows, columns)

    scores = halves._scores
    monkeypatch.setattr(halves, "_scores", note)
    found = nearest.nearest_classes(points, k, Ranks.alone())
    return sum(computed) / len(points.base) ** 2, found


def test_groups_that_cannot_be_near_are_left_out(monkeypatch):
    points = class_points(clustered_statistics(6_000, 32, num_groups=30), CPU)
    share, found = scores_computed(points, 32, monkeypatch)
    assert share < 0.25  # the tiles alone are a sixth
    whole = nearest.search_by_rows(points, 32, Ranks.alone())
    np.testing.assert_allclose(found[1], points.squared(whole[1]), rtol=0, atol=2e-6)


def test_where_nothing_can_be_left_out_it_is_half_a_product(monkeypatch):
    points = torch.nn.functional.normalize(torch.randn(5_000, 64, generator=torch.Generator().manual_seed(0)))
    ones, zeros = torch.ones(5_000, 1), torch.zeros(5_000, 1)
    points = ClassPoints(torch.cat([points, ones, zeros], dim=1), torch.cat([points, zeros, ones], dim=1), 1.0)
    share, found = scores_computed(points, 16, monkeypatch)
    assert 0.5 < share <= 0.5 + coarse.TILE / 5_000 / 2  # of the tiles themselves, which are no larger, all
    whole = nearest.search_by_rows(points, 16, Ranks.alone())
    np.testing.assert_allclose(found[1], points.squared(whole[1]), rtol=0, atol=2e-6)


def test_classes_at_one_place():
    with many_classes():
        points = ClassPoints(torch.ones(40, 5), torch.ones(40, 5), 5.0)
        found, distances = nearest.nearest_classes(points, 3, Ranks.alone())
    assert (distances == 0).all() and all(len({row, *own}) == 4 for row, own in enumerate(found.tolist()))
