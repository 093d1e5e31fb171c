"""Means and covariances of rows that come in batches."""

import torch

ROWS_AT_ONCE = 1024


class Moments:
    """Mean and scatter of groups of rows, of which any number of batches may come.

    Parameters
    ----------
    mean : torch.Tensor of shape (g, d)
        Means of the groups.
    scatter : torch.Tensor of shape (g, d, d)
        Sums of the products of the rows less their mean.
    count : int
        Number of rows of each group.
    """

    def __init__(self, mean, scatter, count):
        self.mean = mean
        self.scatter = scatter
        self.count = count

    @classmethod
    def empty(cls, n_groups, n_features, *, dtype, device):
        """Return the moments of no rows; what a device cannot sum up, the CPU does."""
        if torch.device(device).type == "mps" and dtype == torch.float64:
            device = "cpu"
        settings = {"dtype": dtype, "device": device}
        return cls(
            torch.zeros(n_groups, n_features, **settings),
            torch.zeros(n_groups, n_features, n_features, **settings),
            0,
        )

    def add(self, rows):
        """Take further rows in.

        Parameters
        ----------
        rows : torch.Tensor of shape (g, n, d)
            Rows of each group.
        """
        rows = rows.to(self.mean.device)
        mean = rows.mean(dim=1)
        # what is left after the batch's own mean keeps its digits in float32, too, if
        # few products are summed up in it
        for part in (rows - mean[:, None]).split(ROWS_AT_ONCE, dim=1):
            if part.dtype == self.scatter.dtype:
                self.scatter.baddbmm_(part.mT, part)
            else:
                self.scatter += part.mT @ part
        step = mean.to(self.mean.dtype) - self.mean
        n = rows.shape[1]
        share = n / (self.count + n)
        self.scatter.baddbmm_(step[:, :, None], step[:, None], alpha=self.count * share)
        self.mean += share * step
        self.count += n

    def merged(self, other):
        """Return the moments of the rows of both, which stay as they are."""
        count = self.count + other.count
        share = other.count / max(1, count)
        step = other.mean - self.mean
        between = self.count * share * step[:, :, None] * step[:, None]
        return Moments(
            self.mean + share * step, self.scatter + other.scatter + between, count
        )
