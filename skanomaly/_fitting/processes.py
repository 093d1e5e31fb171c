"""Work shared by the processes that torchrun starts."""

import itertools

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """The processes that train together, or this one alone.

    There are several once ``torch.distributed.init_process_group()`` was called in each
    of them. All are to call the same methods in the same order.

    Attributes
    ----------
    rank : int
        Number of this process.
    count : int
        Number of processes.
    """

    def __init__(self):
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.count = distributed.get_world_size() if together else 1
        self._wrapped = {}

    def check_batches(self, n_images):
        """Raise if a batch of ``n_images`` leaves a process without two images."""
        if self.count > 1 and n_images < 2 * self.count:
            raise ValueError(
                f"A batch of {n_images} images is too small for {self.count} "
                "processes, which need 2 each. A larger batch_size helps."
            )

    def own_seed(self, seed, epoch):
        """Return a seed for an epoch that no other process has."""
        return seed + 1_000_003 * self.rank + epoch

    def share_state(self, network):
        """Overwrite the parameters and buffers of a network by the first process's."""
        for tensor in network.state_dict().values():
            self.of_first(tensor)

    def wait(self):
        """Wait until all processes have come here."""
        if self.count > 1:
            distributed.barrier()

    def object_of_first(self, value):
        """Return the object that the first process has."""
        values = [value]
        if self.count > 1:
            distributed.broadcast_object_list(values, 0)
        return values[0]

    def of_first(self, tensor):
        """Overwrite a tensor by that of the first process; return it."""
        if self.count > 1:
            distributed.broadcast(tensor, 0)
        return tensor

    def mean(self, number):
        """Return the mean of a number, given as a tensor, over the processes."""
        if self.count > 1:
            distributed.all_reduce(number)
        return number / self.count

    def share(self, indices):
        """Return this process's part of a batch, and the weight of its mean loss."""
        share = indices[self.rank :: self.count]
        return share, len(share) * self.count / len(indices)

    def joined(self, part, loss):
        """Return a loss whose gradients for ``part`` are means over the processes."""
        if self.count == 1:
            return loss
        if part not in self._wrapped:
            self._wrapped[part] = DistributedDataParallel(
                _Bystander(part), init_sync=False, find_unused_parameters=True
            )
        return self._wrapped[part](loss)

    def shares(self, batches):
        """Divide batches, given as slices, into one run of neighbours a process."""
        if len(batches) < self.count:
            raise ValueError(
                f"{len(batches)} batches are too few for {self.count} processes. A "
                "smaller batch_size helps."
            )
        ends = np.linspace(0, len(batches), self.count + 1).astype(int)
        return [batches[a:b] for a, b in itertools.pairwise(ends)]

    def gather(self, shares, array):
        """Fill in the rows of an array that other processes have computed."""
        if self.count == 1:
            return
        for rank, share in enumerate(shares):
            rows = slice(share[0].start, share[-1].stop)
            distributed.broadcast(torch.from_numpy(array[rows]), rank)


class _Bystander(nn.Module):
    """Holds the parameters of a network through which the loss has already gone.

    DistributedDataParallel wants to see the forward pass of a network whole. The losses
    here call networks, and parts of them, as they please; so it is shown the end only,
    from where it finds the way back to the parameters.
    """

    def __init__(self, part):
        super().__init__()
        self.parameters_of_part = nn.ParameterList(part.parameters())

    def forward(self, loss):
        return loss
