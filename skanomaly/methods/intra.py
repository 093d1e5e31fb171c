"""InTra: an inpainting transformer (Pirnay and Chai, ICIAP 2022).

An image is a grid of patches. A transformer sees a square window of it in which one
patch is hidden, and paints that patch from the others; attention reaches as far as the
window. Each patch of a new image is painted once, and the painted image compared with
the image itself, relative to how well the training images are painted.
"""

from numbers import Integral, Real

import torch
import torch.nn.functional as F
from sklearn.utils import gen_batches
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

from .._fitting.persistence import shared_tensor
from .._tensors.filters import mean_filter, scaled_size
from .._tensors.losses import msgms_loss, msgms_map, ssim_loss
from .._tensors.masking import windows
from .._tensors.networks import pad_to_multiple
from ..base import NetworkDetector

N_SCALES = 3
WINDOWS_AT_ONCE = 256


class FeatureAttention(nn.Module):
    """Attention of several heads whose queries and keys come from small networks."""

    def __init__(self, width, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.query, self.key = (
            nn.Sequential(
                nn.Linear(width, 2 * width),
                nn.GELU(),
                nn.Linear(2 * width, width // 2),
            )
            for _ in range(2)
        )
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens):
        query, key, value = (
            part(tokens).unflatten(2, (self.n_heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )  # (w, n_heads, n_tokens, width / (2 * n_heads)), values twice as wide
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a small network, around both of which the input passes."""

    def __init__(self, width, n_heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = FeatureAttention(width, n_heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens):
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class InpaintingTransformer(nn.Module):
    """Transformer that paints the hidden patch of a window.

    Parameters
    ----------
    patch_length : int
        Number of values of a patch.
    n_positions : int
        Number of position vectors: that of the cells of the grid or of a window.
    width, n_heads, n_blocks : int
        Size of the transformer.
    """

    def __init__(self, patch_length, n_positions, width, n_heads, n_blocks):
        super().__init__()
        self.embed = nn.Linear(patch_length, width)
        self.hidden_patch = nn.Parameter(0.02 * torch.randn(width))
        self.positions = nn.Parameter(0.02 * torch.randn(n_positions, width))
        self.blocks = nn.ModuleList(Block(width, n_heads) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, patch_length)

    def forward(self, embedded, positions, hidden):
        """Paint the hidden patches.

        Parameters
        ----------
        embedded : torch.Tensor of shape (w, n_tokens, width)
            Patches of each window as ``embed`` returns them.
        positions : torch.Tensor of shape (w or 1, n_tokens)
            Numbers of the position vectors.
        hidden : torch.Tensor of shape (w,)
            Number of the hidden patch within its window.

        Returns
        -------
        torch.Tensor of shape (w, patch_length)
            Painted patches.
        """
        numbers = torch.arange(embedded.shape[1], device=embedded.device)
        is_hidden = (numbers == hidden[:, None])[..., None]
        tokens = torch.where(is_hidden, self.hidden_patch, embedded)
        tokens = tokens + self.positions[positions]  # (w, n_tokens, width)

        # the early blocks feed their mirror images, as the levels of a U-Net do
        n_pairs = (len(self.blocks) - 1) // 2
        early = []
        for i, block in enumerate(self.blocks):
            if i >= len(self.blocks) - n_pairs:
                tokens = tokens + early.pop()
            tokens = block(tokens)
            if i < n_pairs:
                early.append(tokens)
        return self.head(self.norm(tokens).mean(dim=1))


class InTra(NetworkDetector):
    """InTra: hide a patch and paint it by attention to the patches around.

    A transformer learns on normal images to paint the hidden patch of a window of
    patches. An image is anomalous where its gradients differ from those of the painted
    patches otherwise than they do on average in the training images.

    Parameters
    ----------
    patch_size : int, default=16
        Side length of a patch in pixels.
    window_size : int, default=7
        Number of patches a side of a window.
    positions : {"global", "local"}, default="global"
        Where a patch stands: in the image, which suits objects that are all placed
        alike, or in its window, which suits textures.
    reference : {"squared", "excess", "none"}, default="squared"
        How the map is compared with the mean map of the training images: squared
        difference, the positive part of the difference, or not at all.
    width : int, default=512
        Length of the vectors of the transformer, a multiple of twice ``n_heads``.
    n_heads : int, default=8
        Number of attention heads.
    n_blocks : int, default=13
        Number of blocks of the transformer.
    windows_per_image : int, default=32
        Number of windows of each image in a training batch, drawn anew every epoch.
    gms_weight, ssim_weight : float, default=0.01
        Weights of the gradient magnitude and the structural similarity beside the mean
        squared error.
    smoothing_size : int, default=21
        Side length of the mean filter of the maps, in pixels of an image of 256 pixels.
        Scaled with the size of the images it becomes an odd number, from 3 on.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.
    max_epochs : int, default=4000
        Largest number of passes over the training images.
    learning_rate : float, default=1e-4
        Learning rate of Adam.
    batch_size : int, default=8
        Number of images a batch, in training and in prediction.
    validation_fraction : float, default=0.1
        Share of the training images that is held out if there is an early stop.
    n_iter_no_change : int or None, default=950
        Stop after so many epochs without a lower loss of the images held out, and go
        back to the weights of the lowest. None trains all epochs on all images.
    contamination : float, default=0.01
        Share of the training images that ``predict`` is to call anomalous.
    precision : {"float32", "bfloat16"}, default="float32"
        Precision of the network; the losses are always computed in float32.
    device : str, default="auto"
        Torch device. "auto" takes that of X if it is a tensor, else a GPU if there is
        one.
    random_state : int, RandomState instance or None, default=None
        Seed of the initial weights, the order of the images and the windows.
    warm_start : bool, default=False
        Whether a second fit continues the training of the first.
    checkpoint : str or path-like, default=None
        File to which the training writes its progress. A fit that was killed goes on
        from it if it is started again with the same parameters and images, and ends as
        if it had not been. A fit that comes to its end removes the file.
    checkpoint_every : int, default=10
        Number of epochs between two writings of the file.
    verbose : int, default=0
        Whether to show progress bars, in fit and in predictions that take a while.

    Attributes
    ----------
    network_ : torch.nn.Module
        The trained transformer.
    mean_map_ : numpy.ndarray of shape (H, W)
        Mean map of the training images, before the comparison with it.
    loss_curve_ : list of float
        Mean training loss of every epoch.
    validation_curve_ : list of float
        Validation loss of every epoch; empty without an early stop.
    n_iter_ : int
        Number of epochs trained.
    offset_ : float
        Threshold of ``score_samples`` below which ``predict`` calls an image anomalous.
    map_threshold_ : float
        Threshold of the maps above which ``segment`` marks a pixel.
    image_shape_ : tuple of int
        Shape (H, W, C) of the images.
    n_features_in_ : int
        H * W * C.
    feature_names_in_ : numpy.ndarray of shape (n_features,)
        Names of the columns; only where X was a data frame of rows.

    See Also
    --------
    RIAD : Paints by convolutions, which are faster and look less far.

    Notes
    -----
    The paper's text was not at hand; public ports differ from each other. Chosen here:

    - Block i of 13 feeds block 14 - i for i up to 6. Some ports are one off.
    - Any patch of a window may be hidden in training. In prediction it is the one in
      the centre, or as near to it as the border allows.
    - The weights of the similarities are 0.01; some ports have 1.
    - The paper draws 600 windows an image and epoch. Here an epoch has
      ``windows_per_image``, so that 19 epochs make one of the paper's, and
      ``n_iter_no_change=950`` 50 of them.
    - The window of the structural similarity is odd, no larger than a patch, and 11
      pixels at most.
    - Position vectors and the vector of the hidden patch begin with normal numbers of
      standard deviation 0.02, which no source gives.
    - Beyond the border gradients repeat the last pixel, and the mean filter of the maps
      averages over fewer pixels.
    - There is no augmentation and no dropout. Plain attention is not offered.
    - Images are padded by replication to a multiple of ``patch_size``.

    On a processor, images of 64 pixels, ``patch_size=8``, ``window_size=5``,
    ``width=128``, ``n_heads=4``, ``n_blocks=5``, ``windows_per_image=8``,
    ``learning_rate=1e-3``, ``max_epochs=100`` and ``n_iter_no_change=None`` are a good
    start for some fifty images.

    References
    ----------
    J. Pirnay, K. Chai. "Inpainting transformer for anomaly detection". ICIAP 2022,
    pp. 394-406. arXiv 2104.13897.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import InTra
    >>> X = np.random.default_rng(0).uniform(size=(16, 32, 32, 1))
    >>> detector = InTra(
    ...     patch_size=8, window_size=3, width=16, n_heads=2, n_blocks=2, max_epochs=2
    ... )
    >>> detector.fit(X).localize(X[:2]).shape
    (2, 32, 32)
    """

    _parameter_constraints = {
        **NetworkDetector._parameter_constraints,
        "patch_size": [Interval(Integral, 1, None, closed="left")],
        "window_size": [Interval(Integral, 1, None, closed="left")],
        "positions": [StrOptions({"global", "local"})],
        "reference": [StrOptions({"squared", "excess", "none"})],
        "width": [Interval(Integral, 2, None, closed="left")],
        "n_heads": [Interval(Integral, 1, None, closed="left")],
        "n_blocks": [Interval(Integral, 1, None, closed="left")],
        "windows_per_image": [Interval(Integral, 1, None, closed="left")],
        "gms_weight": [Interval(Real, 0, None, closed="left")],
        "ssim_weight": [Interval(Real, 0, None, closed="left")],
        "smoothing_size": [Interval(Integral, 1, None, closed="left")],
    }

    _judged_by = ("reference", "smoothing_size")

    def __init__(
        self,
        *,
        patch_size=16,
        window_size=7,
        positions="global",
        reference="squared",
        width=512,
        n_heads=8,
        n_blocks=13,
        windows_per_image=32,
        gms_weight=0.01,
        ssim_weight=0.01,
        smoothing_size=21,
        image_shape=None,
        max_epochs=4000,
        learning_rate=1e-4,
        batch_size=8,
        validation_fraction=0.1,
        n_iter_no_change=950,
        contamination=0.01,
        precision="float32",
        device="auto",
        random_state=None,
        warm_start=False,
        checkpoint=None,
        checkpoint_every=10,
        verbose=0,
    ):
        self.patch_size = patch_size
        self.window_size = window_size
        self.positions = positions
        self.reference = reference
        self.width = width
        self.n_heads = n_heads
        self.n_blocks = n_blocks
        self.windows_per_image = windows_per_image
        self.gms_weight = gms_weight
        self.ssim_weight = ssim_weight
        self.smoothing_size = smoothing_size
        self.image_shape = image_shape
        self.max_epochs = max_epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.contamination = contamination
        self.precision = precision
        self.device = device
        self.random_state = random_state
        self.warm_start = warm_start
        self.checkpoint = checkpoint
        self.checkpoint_every = checkpoint_every
        self.verbose = verbose

    @property
    def _grid(self):
        """Numbers of patches along both sides of an image."""
        return tuple(-(-side // self.patch_size) for side in self.image_shape_[:2])

    def _build_network(self):
        n_rows, n_columns = self._grid
        return InpaintingTransformer(
            self.patch_size**2 * self.image_shape_[2],
            n_rows * n_columns if self.positions == "global" else self.window_size**2,
            self.width,
            self.n_heads,
            self.n_blocks,
        )

    def _check_settings(self):
        if self.width % (2 * self.n_heads):
            raise ValueError(
                f"width={self.width} must be a multiple of 2 * n_heads, "
                f"{2 * self.n_heads}."
            )
        if self.window_size > min(self._grid):
            raise ValueError(
                f"window_size={self.window_size} is more than the images have patches: "
                f"{self._grid} patches of patch_size={self.patch_size} in images of "
                f"shape {self.image_shape_}."
            )

    def _survey(self, images):
        total = 0.0
        for _, distances in self._in_batches(images, self._distances):
            total = total + distances.sum(dim=0)
        self.mean_map_ = (total / len(images)).cpu().numpy()

    def _patches(self, images):
        """Cut images into patches: (b, n_patches, patch_length)."""
        images = pad_to_multiple(images, self.patch_size)
        return F.pixel_unshuffle(images, self.patch_size).flatten(2).transpose(1, 2)

    def _paint(self, network, embedded, cells, hidden):
        """Paint one patch of each window; ``cells`` and ``embedded`` are of windows."""
        if self.positions == "global":
            positions = cells
        else:
            positions = torch.arange(self.window_size**2, device=cells.device)[None]
        return network(embedded, positions, hidden)

    def _losses(self, network, batch):
        images, generator = batch.images, batch.generator
        n_images, channels = images.shape[:2]
        n = n_images * self.windows_per_image
        free = [side - self.window_size for side in self._grid]
        corners = torch.stack(
            [torch.randint(side + 1, (n,), generator=generator) for side in free], dim=1
        )
        cells = windows(
            *self._grid, self.window_size, corners=corners, device=images.device
        )  # (n, window_size ** 2)
        hidden = torch.randint(cells.shape[1], (n,), generator=generator)
        hidden = hidden.to(images.device)
        owners = torch.arange(n, device=images.device) % n_images
        patches = self._patches(images)
        painted = self._paint(
            network, network.embed(patches)[owners[:, None], cells], cells, hidden
        )
        targets = patches[owners, cells.gather(1, hidden[:, None])[:, 0]]

        shape = (channels, self.patch_size, self.patch_size)
        painted, targets = painted.unflatten(1, shape), targets.unflatten(1, shape)
        size = min(11, self.patch_size - 1 + self.patch_size % 2)
        yield (
            network,
            F.mse_loss(painted.float(), targets)
            + self.gms_weight * msgms_loss(painted, targets, n_scales=N_SCALES)
            + self.ssim_weight * ssim_loss(painted, targets, window_size=size),
        )

    def _paint_all(self, images):
        """Return images (b, c, h, w) each patch of which was painted while hidden."""
        length, n_columns = self.window_size, self._grid[1]
        height, width = images.shape[-2:]
        patches = self._patches(images)
        n_images, n_patches = patches.shape[:2]
        cells = windows(*self._grid, length, device=images.device)
        own = torch.arange(n_patches, device=images.device)
        hidden = (cells == own[:, None]).int().argmax(dim=1)
        embedded = self.network_.embed(patches)
        painted = torch.empty_like(patches)
        owners = torch.arange(n_images, device=images.device)
        owner, patch = torch.cartesian_prod(owners, own).T
        for chunk in gen_batches(len(owner), WINDOWS_AT_ONCE):
            i, j = owner[chunk], patch[chunk]
            painted[i, j] = self._paint(
                self.network_, embedded[i[:, None], cells[j]], cells[j], hidden[j]
            ).to(painted.dtype)
        painted = painted.transpose(1, 2).unflatten(2, (-1, n_columns))
        return F.pixel_shuffle(painted, self.patch_size)[..., :height, :width]

    def _distances(self, images, generator):
        """Return the distances of images from what is painted: (b, h, w)."""
        similarity = msgms_map(self._paint_all(images), images, n_scales=N_SCALES)
        size = scaled_size(self.smoothing_size, similarity)
        return mean_filter(1 - similarity, size, padding="none")

    def _judge(self, images, *, maps_wanted, generator):
        maps = self._distances(images, generator)
        if self.reference != "none":
            excess = maps - shared_tensor(self.mean_map_).to(maps.device)
            by_square = self.reference == "squared"
            maps = excess.square() if by_square else excess.clamp(min=0)
        return maps.amax(dim=(1, 2)), maps
