"""Nearest neighbours among many vectors, exactly and in bounded memory."""

import contextlib
import warnings

import numpy as np
import torch

from .filters import full_precision

# queries and gallery rows whose products stay in a processor's cache
QUERY_CHUNK = 512
TILE = 1024
GROUP = 16
SPARE_GROUPS = 3
SPARE_ROWS = 4
# values of prepared gallery rows, and of neighbours gathered at a time
BLOCK_VALUES = 2**21
GATHERED_VALUES = 2**18
N_CANDIDATES = 10
BLOCK_ROWS = 1024  # of what the farthest rows are chosen from
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
    the squared distances up to rounding, tile by tile. Of every group of gallery rows
    (16, or single ones where the gallery is small) only the smallest is kept. The
    ``n_neighbors`` nearest rows lie in as many groups, and within these all distances
    are computed from differences. Queries for which further groups are as near, up to
    the rounding of the product, have those of three groups, or 48 rows, more. Only
    where rows beyond these are as near, one of them may come out instead. A gallery of
    a few groups is compared whole.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.neighbors import nearest_distances
    >>> gallery = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    >>> nearest_distances(torch.tensor([[0.0, 1.0]]), gallery)
    (tensor([[1.]]), tensor([[0]]))
    """
    n_channels = gallery.shape[1]
    # the fewer rows, the less it costs to keep all products, and the more to gather the
    # rows of a group
    group = GROUP if len(gallery) > GROUP * n_channels else 1
    n_groups = n_neighbors + SPARE_GROUPS
    if len(gallery) <= n_groups * GROUP or not len(queries):
        everything = torch.arange(len(gallery), device=queries.device)
        everything = everything.expand(len(queries), -1)
        return rank_candidates(queries, gallery, everything, n_neighbors)
    closeness, firsts, norms, reach = _nearest_groups(queries, gallery, n_groups, group)
    members = TILE // group * torch.arange(group, device=queries.device)

    def ranked(queries, firsts):
        candidates = (firsts[:, :, None] + members).flatten(1)
        return rank_candidates(queries, gallery, candidates, n_neighbors)

    distances, indices = ranked(queries, firsts[:, :n_neighbors])
    # what rounding may take from a product: its bound in float32, and what is seen,
    # which is more where TF32 is allowed
    bound = torch.finfo(norms.dtype).eps * n_channels * reach * (norms + reach / 2)
    seen = closeness[:, 0] - (norms.square() - distances[:, 0].square()) / 2
    gaps = closeness[:, n_neighbors - 1] - closeness[:, n_neighbors]
    # a NaN is in doubt, too
    doubtful = (~(gaps > 2 * (bound + seen.abs().max()))).nonzero()[:, 0]
    if len(doubtful):
        queries, firsts = queries[doubtful], firsts[doubtful]
        if group == 1:  # as many rows as the groups of a large gallery have
            n_groups = n_neighbors + SPARE_GROUPS * GROUP
            _, firsts, *_ = _nearest_groups(queries, gallery, n_groups, group)
        distances[doubtful], indices[doubtful] = ranked(queries, firsts)
    return distances, indices


def on_device(number, like):
    """Return how much to do at a time: more on a GPU, which has no such caches."""
    return number if like.device.type == "cpu" else 16 * number


def _nearest_groups(queries, gallery, n_groups, group):
    """Find the nearest groups of rows of each query.

    A tile of the gallery is folded into ``group`` layers; rows that come to lie on each
    other are a group. The gallery has more than ``n_groups * group`` rows.

    Returns
    -------
    closeness : torch.Tensor of shape (n_queries, n_groups)
        Half the squared norm of the centred query less half the least squared distance
        to each group, in descending order.
    firsts : torch.Tensor of shape (n_queries, n_groups)
        First rows of the groups.
    norms : torch.Tensor of shape (n_queries,)
        Norms of the centred queries.
    reach : torch.Tensor of shape ()
        The largest norm of the centred gallery.
    """
    n_rows = TILE * max(1, BLOCK_VALUES // (TILE * gallery.shape[1]))
    # far from the origin, squares would swallow the differences in rounding; and one
    # more column lets the product itself subtract half the squared norm of each row
    center = gallery.mean(dim=0)
    extended = queries.new_empty(len(queries), queries.shape[1] + 1)
    torch.sub(queries, center, out=extended[:, :-1])
    extended[:, -1] = -1
    best = extended.new_full((len(extended), n_groups), -torch.inf)
    groups = torch.zeros_like(best, dtype=torch.int64)
    reach = extended.new_zeros(())
    n_together = on_device(QUERY_CHUNK, extended)
    chunks = [part.split(n_together) for part in (extended, best, groups)]
    columns = torch.arange(TILE // group, device=extended.device)
    block = extended.new_empty(min(n_rows, len(gallery)), extended.shape[1])
    for start in range(0, len(gallery), n_rows):
        rows = gallery[start : start + n_rows]
        block = block[: len(rows)]  # one buffer for all: fresh memory costs page faults
        torch.sub(rows, center, out=block[:, :-1])
        norms = torch.linalg.vector_norm(block[:, :-1], dim=1)
        reach = torch.maximum(reach, norms.max())
        block[:, -1] = norms**2 / 2
        tiles = block.split(TILE)
        firsts = torch.cat([start + TILE * i + columns for i in range(len(tiles))])
        for chunk, chunk_best, chunk_groups in zip(*chunks, strict=True):
            maxima = _group_maxima(chunk, tiles, group)
            own, kept = maxima.topk(min(n_groups, maxima.shape[1]))
            own_groups = firsts[kept]
            if start:
                own_groups = torch.cat([chunk_groups, own_groups], dim=1)
                own, kept = torch.cat([chunk_best, own], dim=1).topk(n_groups)
                own_groups = own_groups.gather(1, kept)
            chunk_best[:, : own.shape[1]] = own
            chunk_groups[:, : own.shape[1]] = own_groups
    return best, groups, extended[:, :-1].norm(dim=1), reach


def _group_maxima(queries, tiles, group):
    """Return the greatest product (n_queries, n_groups) of queries with each group."""
    n_columns = TILE // group
    maxima = queries.new_empty(len(queries), len(tiles) * n_columns)
    products = queries.new_empty(len(queries), TILE) if group > 1 else None
    parts = maxima.split(n_columns, dim=1)
    for tile, part in zip(tiles, parts, strict=True):
        found = part if group == 1 else products
        # half the squared norm of the query less half the squared distance
        torch.mm(queries, tile.T, out=found[:, : len(tile)])
        if len(tile) < TILE:
            found[:, len(tile) :] = -torch.inf
        if group > 1:
            torch.amax(products.view(-1, group, n_columns), dim=1, out=part)
    return maxima


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
    distances = []
    n_values = candidates.shape[1] * gallery.shape[1]
    n_together = max(1, on_device(GATHERED_VALUES, queries) // n_values)
    for chunk, chosen in zip(
        queries.split(n_together), candidates.split(n_together), strict=True
    ):
        known = chosen.clamp(max=len(gallery) - 1).to(gallery.device)
        # half the time of gallery[known] on a processor
        neighbors = gallery.index_select(0, known.flatten()).to(queries.device)
        neighbors = neighbors.view(*known.shape, gallery.shape[1])
        found = torch.linalg.vector_norm(neighbors.sub_(chunk[:, None]), dim=2)
        distances.append(found.masked_fill_(chosen >= len(gallery), torch.inf))
    distances, kept = torch.cat(distances).topk(n_neighbors, largest=False)
    return distances, candidates.gather(1, kept)


@contextlib.contextmanager
def _torch_threads_kept():
    """Undo that numba, where it uses OpenMP, sets the number of threads for torch."""
    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def traceable_nearest_distances(queries, gallery, *, n_neighbors=1):
    """Find what `nearest_distances` finds, by few operations and in more memory.

    An exported graph of them does not grow with the gallery.

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
        Distances in ascending order, computed from differences.
    indices : torch.Tensor of shape (n_queries, n_neighbors)
        Rows of the gallery.
    """
    center = gallery.mean(dim=0)
    others = gallery - center
    # half the squared norm of the query less half the squared distance
    closeness = (queries - center) @ others.T - others.square().sum(dim=1) / 2
    n_kept = min(n_neighbors + SPARE_ROWS, len(gallery))
    kept = closeness.topk(n_kept, dim=1).indices
    distances = (gallery[kept] - queries[:, None]).norm(dim=2)
    distances, order = distances.topk(n_neighbors, dim=1, largest=False)
    return distances, kept.gather(1, order)


def farthest_rows(rows, *, generator, n_start=10):
    """Choose rows one after the other, each the farthest from those before it.

    Parameters
    ----------
    rows : torch.Tensor of shape (n, d)
        What is chosen from. Far from the origin, rounding swallows small distances.
    generator : torch.Generator
        What the first rows are drawn from.
    n_start : int, default=10
        Number of rows drawn at random. The mean distance to them stands for that to the
        nearest chosen one before a row is chosen; they are not chosen themselves.

    Yields
    ------
    int
        A row; after n of them there are no more.

    Notes
    -----
    This is the greedy solution of the k-centre problem. Distances to the chosen rows
    only fall, so the maximum of a block of rows, once known, is an upper bound for
    ever. A block is compared with what was chosen meanwhile only when its bound is the
    highest of all, in one matrix product; the rows are those that a comparison of all
    rows with each chosen one would give. Memory is that of a few blocks.

    References
    ----------
    T. Gonzalez. "Clustering to minimize the maximum intercluster distance".
    Theoretical Computer Science 38, 1985.
    """
    n = len(rows)
    norms = rows.square().sum(dim=1)
    start = rows[torch.randperm(n, generator=generator)[:n_start].to(rows.device)]
    nearest = torch.cat(
        [torch.cdist(own, start).mean(dim=1).square() for own in rows.split(BLOCK_ROWS)]
    )
    blocks = [slice(i, min(i + BLOCK_ROWS, n)) for i in range(0, n, BLOCK_ROWS)]
    bounds = np.array([nearest[block].max().item() for block in blocks])
    n_compared = [0] * len(blocks)
    chosen = torch.empty(n, dtype=torch.int64, device=rows.device)
    for k in range(n):
        while True:
            highest = int(bounds.argmax())
            block = blocks[highest]
            if n_compared[highest] == k:
                break
            for others in chosen[n_compared[highest] : k].split(4 * BLOCK_ROWS):
                squares = torch.addmm(
                    norms[others], rows[block], rows[others].T, alpha=-2
                ).amin(dim=1)
                torch.minimum(
                    nearest[block], squares + norms[block], out=nearest[block]
                )
            bounds[highest] = nearest[block].max().item()
            n_compared[highest] = k
        chosen[k] = block.start + nearest[block].argmax()
        # rounding must not have it chosen again
        nearest[chosen[k]] = -torch.inf
        yield int(chosen[k])


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
