"""Nearest neighbours among many vectors, exactly and in bounded memory."""

import contextlib
import warnings

import numpy as np
import torch
import torch.nn.functional as F

from .filters import full_precision

QUERY_CHUNK = 2048
GALLERY_CHUNK = 4096
GROUP = 32
GATHERED_VALUES = 2**20
N_CANDIDATES = 10
RECALL_SAMPLE = 500
MIN_RECALL = 0.95


@full_precision
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
        Distances in ascending order, computed from differences: equal vectors have the
        distance 0.
    indices : torch.Tensor of shape (n_queries, n_neighbors)
        Rows of the gallery.

    Notes
    -----
    A matrix product of queries and gallery, both centred at the gallery's mean, gives
    the squared distances up to rounding, chunk by chunk. Of every group of 32 gallery
    rows only the smallest is kept. The ``n_neighbors`` nearest rows lie in as many
    groups; one group more is kept against rounding, and within these groups all
    distances are computed from differences. Only where hundreds of rows lie closer
    together than the rounding of the product, another of them may come out nearest.

    Examples
    --------
    >>> import torch
    >>> from skanomaly.neighbors import nearest_distances
    >>> gallery = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    >>> nearest_distances(torch.tensor([[0.0, 1.0]]), gallery)
    (tensor([[1.]]), tensor([[0]]))
    """
    center = gallery.mean(dim=0)
    found = [
        _search(chunk, gallery, center, n_neighbors)
        for chunk in queries.split(QUERY_CHUNK)
    ]
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(indices)


def _search(queries, gallery, center, n_neighbors):
    n_groups = min(n_neighbors + 1, -(-len(gallery) // GROUP))
    best = queries.new_full((len(queries), n_groups), -torch.inf)
    groups = torch.zeros_like(best, dtype=torch.int64)
    extended = torch.cat([queries - center, -torch.ones_like(queries[:, :1])], dim=1)
    products = queries.new_empty(len(queries), GALLERY_CHUNK)
    for start in range(0, len(gallery), GALLERY_CHUNK):
        block = gallery[start : start + GALLERY_CHUNK] - center
        half_norms = torch.linalg.vector_norm(block, dim=1, keepdim=True) ** 2 / 2
        block = torch.cat([block, half_norms], dim=1)
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
    values = candidates.shape[1] * gallery.shape[1]
    rows_at_once = max(1, GATHERED_VALUES // values)
    for rows in torch.arange(len(queries), device=queries.device).split(rows_at_once):
        chosen = candidates[rows]
        known = chosen.clamp(max=len(gallery) - 1).to(gallery.device)
        neighbors = gallery[known].to(queries.device)  # (rows, candidates, c)
        distances[rows] = torch.linalg.vector_norm(
            neighbors.sub_(queries[rows, None]), dim=2
        ).masked_fill_(chosen >= len(gallery), torch.inf)
    distances, kept = distances.topk(n_neighbors, largest=False)
    return distances, candidates.gather(1, kept)


@contextlib.contextmanager
def _torch_threads_kept():
    """Undo that numba, where it uses OpenMP, sets the number of threads for torch."""
    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


class ApproximateIndex:
    """Approximate nearest neighbours by pynndescent, re-ranked exactly.

    Parameters
    ----------
    gallery : numpy.ndarray of shape (n_gallery, c)
        Vectors among which neighbours are sought; not copied.
    random_state : int
        Seed of the index and of the sample that measures its recall.

    Attributes
    ----------
    recall_ : float
        Share of the nearest other rows that the index finds, for a sample of the
        gallery's rows.

    Warns
    -----
    UserWarning
        If the recall is below 0.95.

    References
    ----------
    W. Dong, C. Moses, K. Li. "Efficient k-nearest neighbor graph construction for
    generic similarity measures". WWW 2011.
    """

    def __init__(self, gallery, random_state):
        from pynndescent import NNDescent

        self.gallery = gallery
        with _torch_threads_kept():
            self.index = NNDescent(gallery, random_state=random_state)
            self.index.prepare()
        self.recall_ = self._measure_recall(np.random.default_rng(random_state))
        if self.recall_ < MIN_RECALL:
            warnings.warn(
                f"The approximate search finds {self.recall_:.1%} of the nearest "
                f"neighbours, less than {MIN_RECALL:.0%}. algorithm='brute' finds all.",
                stacklevel=2,
            )

    def search(self, queries, n_neighbors):
        """Find near neighbours.

        Parameters
        ----------
        queries : torch.Tensor of shape (n_queries, c)
            Vectors whose neighbours are sought.
        n_neighbors : int
            Number of neighbours.

        Returns
        -------
        distances, indices : torch.Tensor of shape (n_queries, n_neighbors)
            Exact distances of the neighbours found, in ascending order, and their rows.
        """
        n_candidates = min(max(N_CANDIDATES, 2 * n_neighbors), len(self.gallery))
        with _torch_threads_kept():
            found, _ = self.index.query(queries.cpu().numpy(), k=n_candidates)
        candidates = torch.from_numpy(found.astype(np.int64))
        candidates[candidates < 0] = len(self.gallery)
        return rank_candidates(
            queries,
            torch.from_numpy(self.gallery),
            candidates.to(queries.device),
            n_neighbors,
        )

    def _measure_recall(self, rng):
        n_sampled = min(RECALL_SAMPLE, len(self.gallery))
        sample = rng.choice(len(self.gallery), n_sampled, replace=False)
        queries = torch.from_numpy(self.gallery[sample])
        gallery = torch.from_numpy(self.gallery)
        # the nearest row is the sampled one itself
        exact, _ = nearest_distances(queries, gallery, n_neighbors=2)
        found, _ = self.search(queries, 2)
        return float((found[:, 1] <= exact[:, 1]).float().mean())
