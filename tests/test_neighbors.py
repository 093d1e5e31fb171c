"""Tests of the nearest-neighbour search, and of SPADE on its approximate index."""

import warnings

import numpy as np
import pytest
import torch

from skanomaly import neighbors
from skanomaly.neighbors import ApproximateIndex, nearest_distances, rank_candidates


def brute_force(queries, gallery, n_neighbors):
    distances = torch.cdist(queries.double(), gallery.double()).sort(dim=1)
    return distances.values[:, :n_neighbors]


@pytest.mark.parametrize("n_neighbors", [1, 3])
@pytest.mark.parametrize("n_gallery", [3, 5, 24, 25, 47, 48, 96, 101])
@pytest.mark.parametrize("query_chunk, n_groups, group", [(7, 3, 8), (10, 1, 5)])
def test_nearest_distances_equal_brute_force(
    monkeypatch, n_neighbors, n_gallery, query_chunk, n_groups, group
):
    monkeypatch.setattr(neighbors, "QUERY_CHUNK", query_chunk)
    monkeypatch.setattr(neighbors, "GROUP", group)
    # groups are numbered across chunks, hence a chunk holds whole groups
    monkeypatch.setattr(neighbors, "GALLERY_CHUNK", n_groups * group)
    monkeypatch.setattr(neighbors, "GATHERED_VALUES", 100)
    generator = torch.Generator().manual_seed(n_gallery)
    queries = torch.randn(20, 6, generator=generator)
    gallery = torch.randn(n_gallery, 6, generator=generator)

    distances, indices = nearest_distances(queries, gallery, n_neighbors=n_neighbors)

    expected = brute_force(queries, gallery, n_neighbors)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-6, atol=0)
    found = torch.linalg.vector_norm(gallery[indices] - queries[:, None], dim=2)
    torch.testing.assert_close(found, distances, rtol=1e-6, atol=0)


def test_nearest_distances_at_the_real_chunk_sizes():
    assert neighbors.GALLERY_CHUNK % neighbors.GROUP == 0
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(neighbors.QUERY_CHUNK + 5, 8, generator=generator)
    gallery = torch.randn(neighbors.GALLERY_CHUNK + 70, 8, generator=generator)
    distances, _ = nearest_distances(queries, gallery, n_neighbors=3)
    expected = brute_force(queries, gallery, 3)
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


def test_duplicates_all_have_distance_zero():
    vector = 100 * torch.rand(1, 32, generator=torch.Generator().manual_seed(0))
    distances, _ = nearest_distances(vector, vector.repeat(100, 1), n_neighbors=5)
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
