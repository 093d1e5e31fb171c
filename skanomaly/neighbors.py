"""Nearest neighbours among many vectors, exactly and in bounded memory."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F

from .filters import full_precision

QUERY_CHUNK = 1024
GALLERY_CHUNK = 4096
GROUP = 32


def nearest_distances(queries, gallery, *, n_neighbors=1):
    """Find the Euclidean distances to the nearest rows of a gallery.

    Parameters
    ----------
    queries : torch.Tensor of shape (n_queries, c)
        Vectors whose neighbours are sought.
    gallery : torch.Tensor of shape (n_gallery, c)
        Vectors among which they are sought.
    n_neighbors : int, default=1
        Number of neighbours, at most ``n_gallery``.

    Returns
    -------
    distances : torch.Tensor of shape (n_queries, n_neighbors)
        Distances in ascending order, exactly 0 for equal vectors.
    indices : torch.Tensor of shape (n_queries, n_neighbors)
        Rows of the gallery.

    Notes
    -----
    A matrix product of queries and gallery, chunk by chunk, gives the squared distances
    up to rounding. Of every group of 32 gallery rows only the smallest is kept. The
    ``n_neighbors`` nearest rows lie in as many groups; one group more is kept against
    rounding, and within these groups all distances are computed from differences.

    Examples
    --------
    >>> import torch
    >>> from skanomaly.neighbors import nearest_distances
    >>> gallery = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    >>> nearest_distances(torch.tensor([[0.0, 1.0]]), gallery)
    (tensor([[1.]]), tensor([[0]]))
    """
    half_norms = torch.linalg.vector_norm(gallery, dim=1, keepdim=True) ** 2 / 2
    found = [
        _search(chunk, gallery, half_norms, n_neighbors)
        for chunk in queries.split(QUERY_CHUNK)
    ]
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(indices)


@full_precision
def _search(queries, gallery, half_norms, n_neighbors):
    n_groups = min(n_neighbors + 1, -(-len(gallery) // GROUP))
    best = queries.new_full((len(queries), n_groups), -torch.inf)
    groups = torch.zeros_like(best, dtype=torch.int64)
    extended = torch.cat([queries, -torch.ones_like(queries[:, :1])], dim=1)
    products = queries.new_empty(len(queries), GALLERY_CHUNK)
    for start in range(0, len(gallery), GALLERY_CHUNK):
        rows = slice(start, start + GALLERY_CHUNK)
        block = torch.cat([gallery[rows], half_norms[rows]], dim=1)
        # half the squared norm of the query less half the squared distance
        closeness = torch.mm(extended, block.T, out=products[:, : len(block)])
        maxima = _group_maxima(closeness)  # (n_queries, rows / GROUP)
        numbers = torch.arange(maxima.shape[1], device=queries.device) + start // GROUP
        best, kept = torch.cat([best, maxima], dim=1).topk(n_groups)
        numbers = torch.cat([groups, numbers.expand(len(queries), -1)], dim=1)
        groups = numbers.gather(1, kept)
    candidates = groups[:, :, None] * GROUP + torch.arange(GROUP, device=queries.device)
    return rank_candidates(queries, gallery, candidates.flatten(1), n_neighbors)


def _group_maxima(closeness):
    missing = -closeness.shape[1] % GROUP
    if missing:
        closeness = F.pad(closeness, (0, missing), value=-torch.inf)
    return closeness.view(len(closeness), -1, GROUP).amax(dim=2)


def rank_candidates(queries, gallery, candidates, n_neighbors):
    """Find the nearest of some candidates by their exact distances.

    Parameters
    ----------
    queries : torch.Tensor of shape (n_queries, c)
        Vectors whose neighbours are sought.
    gallery : torch.Tensor of shape (n_gallery, c)
        Vectors among which they are sought.
    candidates : torch.Tensor of shape (n_queries, n_candidates)
        Rows of the gallery to choose from; those past its end are passed over.
    n_neighbors : int
        Number of neighbours.

    Returns
    -------
    distances, indices : torch.Tensor of shape (n_queries, n_neighbors)
        Distances in ascending order and rows of the gallery.
    """
    distances = queries.new_empty(candidates.shape)
    rows_at_once = max(1, QUERY_CHUNK * GROUP // candidates.shape[1])
    for rows in torch.arange(len(queries), device=queries.device).split(rows_at_once):
        chosen = candidates[rows]
        neighbors = gallery[chosen.clamp(max=len(gallery) - 1)]  # (rows, candidates, c)
        distances[rows] = torch.linalg.vector_norm(
            neighbors - queries[rows, None], dim=2
        ).masked_fill_(chosen >= len(gallery), torch.inf)
    distances, kept = distances.topk(n_neighbors, largest=False)
    return distances, candidates.gather(1, kept)


class ApproximateIndex:
    """Approximate nearest neighbours by pynndescent, re-ranked exactly.

    Parameters
    ----------
    gallery : torch.Tensor of shape (n_gallery, c)
        Vectors among which neighbours are sought.
    random_state : int
        Seed of the index.

    Attributes
    ----------
    recall_ : float
        Share of a sample of the gallery's own rows, each shifted halfway to a random
        other one, whose nearest neighbour the index finds.
    """
