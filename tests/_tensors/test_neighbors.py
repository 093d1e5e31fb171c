"""Tests of the nearest-neighbour search, and of SPADE on its approximate index."""

import numpy as np
import pytest
import torch

from skanomaly import SPADE
from skanomaly._tensors import neighbors
from skanomaly._tensors.neighbors import (
    ApproximateIndex,
    nearest_distances,
    rank_candidates,
)


def brute_force(queries, gallery, n_neighbors):
    distances = torch.cdist(
        queries.double(),
        gallery.double(),
        compute_mode="donot_use_mm_for_euclid_dist",  # which is not exact
    )
    return distances.sort(dim=1).values[:, :n_neighbors]


@pytest.mark.parametrize("n_neighbors", [1, 3])
@pytest.mark.parametrize("n_gallery", [3, 5, 24, 25, 47, 48, 96, 101])
@pytest.mark.parametrize("query_chunk, n_groups, group", [(7, 3, 8), (10, 1, 5)])
def test_nearest_distances_equal_brute_force(
    monkeypatch, n_neighbors, n_gallery, query_chunk, n_groups, group
):
    monkeypatch.setattr(neighbors, "QUERY_CHUNK", query_chunk)
    monkeypatch.setattr(neighbors, "GROUP", group)
    monkeypatch.setattr(neighbors, "TILE", n_groups * group)
    monkeypatch.setattr(neighbors, "BLOCK_VALUES", 2 * n_groups * group * 6)
    monkeypatch.setattr(neighbors, "SPARE_GROUPS", 1)
    monkeypatch.setattr(neighbors, "GATHERED_VALUES", 100)
    generator = torch.Generator().manual_seed(n_gallery)
    queries = torch.randn(20, 6, generator=generator)
    gallery = torch.randn(n_gallery, 6, generator=generator)

    distances, indices = nearest_distances(queries, gallery, n_neighbors=n_neighbors)

    expected = brute_force(queries, gallery, n_neighbors)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-6, atol=0)
    found = torch.linalg.vector_norm(gallery[indices] - queries[:, None], dim=2)
    torch.testing.assert_close(found, distances, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n_gallery", [3, 2000])
def test_no_queries(n_gallery):
    found = nearest_distances(torch.ones(0, 4), torch.ones(n_gallery, 4), n_neighbors=2)
    assert [part.shape for part in found] == [(0, 2), (0, 2)]


def test_nearest_distances_at_the_real_chunk_sizes():
    generator = torch.Generator().manual_seed(0)
    n_gallery = neighbors.BLOCK_VALUES // 64 + 70
    queries = torch.randn(neighbors.QUERY_CHUNK + 5, 64, generator=generator)
    gallery = torch.randn(n_gallery, 64, generator=generator)
    distances, _ = nearest_distances(queries, gallery, n_neighbors=3)
    expected = brute_force(queries, gallery, 3)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tile", [16, 64, 1024])
@pytest.mark.parametrize("n_gallery", [81, 97, 130])
def test_galleries_that_hold_hardly_more_than_the_groups_wanted(
    monkeypatch, tile, n_gallery
):
    monkeypatch.setattr(neighbors, "TILE", tile)
    monkeypatch.setattr(neighbors, "BLOCK_VALUES", 2 * tile * 4)
    n_neighbors = (n_gallery - 1) // neighbors.GROUP - neighbors.SPARE_GROUPS
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(2, n_gallery, 4, generator=generator)
    distances, _ = nearest_distances(queries, gallery, n_neighbors=n_neighbors)
    expected = brute_force(queries, gallery, n_neighbors)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-6, atol=0)


def test_all_rows_as_neighbors():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(2, 70, 4, generator=generator)
    distances, indices = nearest_distances(queries, gallery, n_neighbors=70)
    expected = brute_force(queries, gallery, 70)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-6, atol=0)
    assert (indices.sort(dim=1).values == torch.arange(70)).all()


@pytest.mark.parametrize("spread, offset", [(1.0, 0.0), (1.0, 1e4), (0.01, 30.0)])
def test_equal_vectors_have_distance_zero(spread, offset):
    """Also among near-duplicates whose norms dwarf their differences."""
    generator = torch.Generator().manual_seed(0)
    gallery = offset + spread * torch.randn(500, 64, generator=generator)
    distances, indices = nearest_distances(gallery, gallery, n_neighbors=2)
    assert (distances[:, 0] == 0).all()
    assert (indices[:, 0] == torch.arange(500)).all()
    expected = brute_force(gallery, gallery, 2)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("n_rows", [60, 100, 600])  # whole, and by single rows
def test_a_row_is_found_among_many_that_are_all_but_equal(n_rows):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n_rows // 12, 64, generator=generator).repeat_interleave(12, 0)
    gallery = rows + 1e-5 * torch.randn(rows.shape, generator=generator)
    gallery = gallery[torch.randperm(len(gallery), generator=generator)]
    distances, indices = nearest_distances(gallery, gallery)
    assert (distances == 0).all()
    assert (indices[:, 0] == torch.arange(len(gallery))).all()


def test_a_query_that_is_no_number_leaves_the_others_exact():
    generator = torch.Generator().manual_seed(0)
    rows, noise = torch.randn(2, 300, 64, generator=generator)
    gallery, queries = torch.cat([rows, rows + 1e-4 * noise]), rows.clone()
    queries[0] = torch.nan
    assert (nearest_distances(queries, gallery)[0][1:] == 0).all()


@pytest.mark.parametrize("n_rows", [300, 1500])  # compared one by one, and in groups
def test_rows_that_a_product_cannot_tell_apart_are_told_apart(n_rows):
    generator = torch.Generator().manual_seed(0)
    rows, noise = torch.randn(2, n_rows, 64, generator=generator)
    gallery = torch.cat([rows, rows + 1e-4 * noise])
    distances, indices = nearest_distances(rows, gallery)
    assert (distances == 0).all()
    assert (indices[:, 0] == torch.arange(n_rows)).all()


def test_duplicates_all_have_distance_zero():
    vector = 100 * torch.rand(1, 32, generator=torch.Generator().manual_seed(0))
    distances, _ = nearest_distances(vector, vector.repeat(1100, 1), n_neighbors=5)
    assert (distances == 0).all()


def test_search_is_in_full_precision_under_autocast():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(2, 200, 32, generator=generator)
    expected = nearest_distances(queries, gallery)
    with torch.autocast("cpu", torch.bfloat16):
        distances, indices = nearest_distances(queries, gallery)
    assert distances.dtype == torch.float32
    assert torch.equal(distances, expected[0])
    assert torch.equal(indices, expected[1])


def test_features_of_half_precision_are_searched_in_float32():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(2, 200, 32, generator=generator).bfloat16()
    distances, _ = nearest_distances(queries, gallery)
    assert distances.dtype == torch.float32
    expected = brute_force(queries, gallery, 1)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-6, atol=0)


def test_rank_candidates_orders_them_and_passes_over_rows_past_the_end():
    gallery = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    queries = torch.tensor([[9.0], [0.0]])
    candidates = torch.tensor([[0, 3, 4, 2], [7, 2, 1, 3]])
    distances, indices = rank_candidates(queries, gallery, candidates, 2)
    assert distances.tolist() == [[1.0, 7.0], [1.0, 2.0]]
    assert indices.tolist() == [[3, 2], [1, 2]]


# The approximate index: numba compiles it for a minute or more, once a process.


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2000, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def index(vectors):
    return ApproximateIndex(vectors, 0)


@pytest.fixture(scope="module")
def queries():
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.normal(size=(300, 16)).astype(np.float32))


def test_an_index_leaves_the_number_of_threads(index, queries):
    n_threads = torch.get_num_threads()
    ApproximateIndex(index.gallery[:200], 0).search(queries, 3)
    assert torch.get_num_threads() == n_threads


def test_index_finds_most_neighbors_at_exact_distances(index, vectors, queries):
    assert 0.95 < index.recall_ <= 1
    distances, indices = index.search(queries, 3)
    found = torch.linalg.vector_norm(
        torch.from_numpy(vectors)[indices].double() - queries[:, None].double(), dim=2
    )
    torch.testing.assert_close(distances.double(), found, rtol=1e-6, atol=0)
    assert (distances.diff(dim=1) >= 0).all()
    expected = brute_force(queries, torch.from_numpy(vectors), 3)
    right = torch.isclose(distances.double(), expected, rtol=1e-5)
    assert right.double().mean() > 0.9


def test_index_finds_the_rows_it_holds(index, vectors):
    distances, indices = index.search(torch.from_numpy(vectors[:100]), 1)
    assert (distances == 0).all()
    assert (indices[:, 0] == torch.arange(100)).all()


def test_index_is_reproducible(index, vectors, queries):
    again = ApproximateIndex(vectors, 0)
    assert again.recall_ == index.recall_
    assert torch.equal(again.search(queries, 3)[1], index.search(queries, 3)[1])


def test_index_warns_of_low_recall(index, vectors, monkeypatch):
    monkeypatch.setattr(neighbors, "MIN_RECALL", 1.01)
    with pytest.warns(UserWarning, match="less than 101%.*algorithm='brute'"):
        ApproximateIndex(vectors, 0)


def test_spade_on_the_index_is_close_to_spade_on_all_images(index):
    rng = np.random.default_rng(0)
    dtype = [("fine", "f4", (12, 12, 8)), ("coarse", "f4", (6, 6, 12))]
    X = np.empty(16, dtype)
    for name in X.dtype.names:
        X[name] = rng.normal(size=X[name].shape)
    parameters = {
        "backbone": "precomputed",
        "layers": ("fine", "coarse"),
        "random_state": 0,
    }
    exact = SPADE(gallery_size=12, **parameters).fit(X[:12])
    # gallery_size is not heeded: the index holds all images
    approximate = SPADE(gallery_size=2, algorithm="nndescent", **parameters).fit(X[:12])

    assert set(approximate.indices_) == {"fine", "coarse"}
    assert all(index.recall_ > 0.95 for index in approximate.indices_.values())
    expected, maps = exact.localize(X), approximate.localize(X)
    assert np.corrcoef(maps[12:].ravel(), expected[12:].ravel())[0, 1] > 0.98
    assert (maps >= expected - 1e-6).all()
    assert (maps[:12] == 0).all()
