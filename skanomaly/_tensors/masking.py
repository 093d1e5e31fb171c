"""What inpainting methods hide: cells, stripes, windows and superpixels.

Masks are 1 where an image is hidden and 0 where it is visible.
"""

import numpy as np
import torch


def disjoint_masks(height, width, *, cell_size, n_masks, generator, device="cpu"):
    """Deal the cells of a grid at random to masks that hide each pixel once.

    Parameters
    ----------
    height, width : int
        Size of the masks in pixels.
    cell_size : int
        Side length of the cells in pixels. Cells at the far borders may be cut.
    n_masks : int
        Number of masks. They get equal numbers of cells, up to one.
    generator : torch.Generator
        What is drawn from, on the CPU.
    device : torch.device or str, default="cpu"
        Device of the masks.

    Returns
    -------
    torch.Tensor of shape (n_masks, 1, height, width)
        Masks whose sum is 1 at each pixel.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.masking import disjoint_masks
    >>> generator = torch.Generator()
    >>> masks = disjoint_masks(8, 8, cell_size=2, n_masks=4, generator=generator)
    >>> masks.sum(dim=(1, 2, 3)), masks.sum(dim=0).unique()
    (tensor([16., 16., 16., 16.]), tensor([1.]))
    """
    n_rows, n_columns = -(-height // cell_size), -(-width // cell_size)
    order = torch.randperm(n_rows * n_columns, generator=generator)
    owners = order.remainder(n_masks)
    owners = owners.view(n_rows, n_columns).to(device)
    owners = owners.repeat_interleave(cell_size, 0).repeat_interleave(cell_size, 1)
    numbers = torch.arange(n_masks, device=device)[:, None, None, None]
    return (owners[:height, :width] == numbers).float()


def stripe_masks(height, width, *, n_stripes, device="cpu"):
    """Return four masks of stripes: vertical and horizontal ones and their complements.

    Parameters
    ----------
    height, width : int
        Size of the masks in pixels.
    n_stripes : int
        Number of stripes a side, hidden and visible ones together; a side of fewer
        pixels has a stripe a pixel.
    device : torch.device or str, default="cpu"
        Device of the masks.

    Returns
    -------
    torch.Tensor of shape (4, 1, height, width)
        Vertical stripes that start hidden, those that start visible, and the same of
        horizontal stripes. Each pixel is hidden by two masks.

    Examples
    --------
    >>> from skanomaly._tensors.masking import stripe_masks
    >>> stripe_masks(1, 4, n_stripes=2)[0]
    tensor([[[1., 1., 0., 0.]]])
    """

    def starting_hidden(size):
        stripes = torch.arange(size, device=device) * min(n_stripes, size) // size
        return (stripes + 1).remainder(2).float()

    vertical = starting_hidden(width).expand(height, width)
    horizontal = starting_hidden(height)[:, None].expand(height, width)
    return torch.stack([vertical, 1 - vertical, horizontal, 1 - horizontal])[:, None]


def windows(n_rows, n_columns, length, *, corners=None, device="cpu"):
    """Return the cells of a grid that square windows cover.

    Parameters
    ----------
    n_rows, n_columns : int
        Size of the grid.
    length : int
        Number of cells a side of a window.
    corners : torch.Tensor of shape (n, 2), default=None
        Row and column of the upper left cell of each window. None takes, for each cell
        of the grid, the window with the cell in its centre, or as near to it as the
        border allows.
    device : torch.device or str, default="cpu"
        Device of the indices.

    Returns
    -------
    torch.Tensor of shape (n, length ** 2)
        Indices of the cells, counted row by row over the grid.

    Examples
    --------
    >>> from skanomaly._tensors.masking import windows
    >>> windows(3, 4, 2)[0]
    tensor([0, 1, 4, 5])
    """
    if corners is None:
        rows = torch.arange(n_rows).sub(length // 2).clamp(0, n_rows - length)
        columns = torch.arange(n_columns).sub(length // 2).clamp(0, n_columns - length)
        corners = torch.cartesian_prod(rows, columns)
    row, column = corners.to(device).T[..., None, None]  # (n, 1, 1) each
    steps = torch.arange(length, device=device)
    return ((row + steps[:, None]) * n_columns + column + steps).flatten(1)


def superpixels(image, *, n_segments, compactness=10.0):
    """Divide an image into superpixels, pieces of similar colour, by SLIC.

    Parameters
    ----------
    image : numpy.ndarray of shape (h, w, c)
        An image with values in [0, 1].
    n_segments : int
        Number of superpixels asked for; SLIC returns about as many.
    compactness : float, default=10.0
        Weight of nearness against similar colour; high values give square pieces.

    Returns
    -------
    numpy.ndarray of shape (h, w)
        Numbers of the superpixels, from 0 on, without gaps.

    Notes
    -----
    Grey images are taken for coloured ones with three equal channels. Pieces of less
    than a quarter of the mean size are merged with a neighbour; an image of which only
    one piece would be left, such as one of noise, is divided into squares.

    References
    ----------
    R. Achanta, A. Shaji, K. Smith, A. Lucchi, P. Fua, S. Süsstrunk. "SLIC superpixels
    compared to state-of-the-art superpixel methods". IEEE TPAMI, 2012.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly._tensors.masking import superpixels
    >>> image = np.zeros((16, 16, 3))
    >>> image[4:12, 4:12] = 1.0
    >>> labels = superpixels(image, n_segments=16)
    >>> set(labels[4:12, 4:12].ravel()) & set(labels[0])
    set()
    """
    from skimage.segmentation import slic

    n_channels = image.shape[2]
    if n_channels == 1:
        image = image.repeat(3, axis=2)
    elif n_channels != 3:
        compactness = compactness / 100  # values within [0, 1], where Lab has 100
    settings = {
        "n_segments": n_segments,
        "compactness": compactness,
        "min_size_factor": 0.25,
        "max_size_factor": n_segments + 1,
        "start_label": 0,
        "channel_axis": -1,
    }
    labels = slic(image, **settings)
    if not labels.any():  # noise falls into small pieces, which are merged
        labels = slic(np.zeros_like(image), **settings)
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
