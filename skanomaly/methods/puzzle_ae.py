"""Puzzle-AE: novelty detection through solving puzzles (Salehi et al., 2020).

An image is cut into four tiles, which are shuffled; one of them is made grey, and the
puzzle is disturbed against the network. A U-Net learns on normal images to put them
together again, and a critic's features sharpen what it makes. Where the solutions of
all puzzles of an image differ from it, by more than is usual for each, something is
there that the network does not know.
"""

import itertools
import math
from functools import partial
from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

from .._fitting.batches import ImageBatches
from .._fitting.loop import Samples, seeded_generator
from .._fitting.persistence import shared_tensor
from .._fitting.processes import Processes
from .._tensors.filters import full_precision, mean_filter, scaled_size
from .._tensors.networks import critic_loss, pad_to_multiple
from ..base import NetworkDetector

SMALLEST_SIDE = 16
CRITIC_SIDE = 4
FGSM_STEP = 2.0
SMALLEST_COST = 1e-12
ZOOM_PROBABILITY = 0.75
PLATEAU = {"factor": 0.8, "patience": 50}
# of all puzzles that pass the network at once, which bounds the memory
PIXELS_TOGETHER = 2**18


def permutations_of_tiles(kind):
    """Return the permutations of four tiles but the one that leaves all in place.

    Parameters
    ----------
    kind : {"all", "transpositions"}
        All 23, or the 6 that exchange two tiles.

    Returns
    -------
    list of tuple of int
        Permutations; the slot ``i`` takes the tile ``permutation[i]``.
    """
    n_moved = (2,) if kind == "transpositions" else (2, 3, 4)
    return [
        permutation
        for permutation in itertools.permutations(range(4))
        if sum(tile != slot for slot, tile in enumerate(permutation)) in n_moved
    ]


def _slots(images):
    """Return the rows and columns of the four slots, from the top left, row by row."""
    height, width = images.shape[-2:]
    halves = [(slice(0, side // 2), slice(side // 2, side)) for side in (height, width)]
    return list(itertools.product(*halves))


def shuffle_tiles(images, permutation):
    """Permute the four tiles of images (b, c, h, w) whose sides are even."""
    slots = _slots(images)
    tiles = [images[(..., *slots[tile])] for tile in permutation]
    return torch.cat([torch.cat(tiles[:2], dim=3), torch.cat(tiles[2:], dim=3)], dim=2)


def grey_tile(puzzles, slot):
    """Return puzzles (b, c, h, w) of which one tile has lost its colours.

    Of images of one channel it is black.
    """
    puzzles = puzzles.clone()
    tile = puzzles[(..., *_slots(puzzles)[slot])]
    tile.copy_(tile.mean(dim=1, keepdim=True) if tile.shape[1] > 1 else 0 * tile)
    return puzzles


def disturb(puzzles, error, epsilon, *, starts_twice, generator):
    """Disturb puzzles by one step of the fast gradient sign method.

    Parameters
    ----------
    puzzles : torch.Tensor of shape (b, c, h, w)
        Puzzles. What is within [0, 1] stays there.
    error : callable
        ``error(disturbed, started)`` returns what the step is to increase, from the
        puzzles with a random start, within [0, 1] and as they were added.
    epsilon : float
        Largest disturbance of a pixel.
    starts_twice : bool
        Whether the random start is added once more, as in the public code; pixels then
        change by up to ``2 * epsilon``.
    generator : torch.Generator
        What the random start is drawn from, on the CPU.

    Returns
    -------
    torch.Tensor of shape (b, c, h, w)
        The disturbed puzzles.
    """
    if epsilon == 0:
        return puzzles
    bounds = {"min": puzzles.clamp(max=0.0), "max": puzzles.clamp(min=1.0)}
    noise = torch.rand(puzzles.shape, generator=generator).to(puzzles.device)
    start = epsilon * (2 * noise - 1)
    started = puzzles + start
    point = started.clamp(**bounds).requires_grad_()
    (slope,) = torch.autograd.grad(error(point, started), point)
    step = (start + FGSM_STEP * slope.sign()).clamp(-epsilon, epsilon)
    from_where = point.detach() if starts_twice else puzzles
    return (from_where + step).clamp(**bounds)


@full_precision
def enlarge(images, factors):
    """Enlarge images (b, c, h, w) about their centre by factors (b,) of at least 1."""
    sides = torch.stack([1 / factors, 1 / factors], dim=1)
    theta = F.pad(torch.diag_embed(sides), (0, 1)).to(images.device)  # (b, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _double(wide, middle, narrow):
    return nn.Sequential(
        nn.Conv2d(wide, middle, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(middle, narrow, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class PuzzleSolver(nn.Module):
    """U-Net without normalisation; its sides are any of at least 16 pixels."""

    def __init__(self, channels, width):
        super().__init__()
        sides = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        self.down = nn.ModuleList(
            _double(wide, narrow, narrow)
            for wide, narrow in itertools.pairwise([channels, *sides])
        )
        outs = [4 * width, 2 * width, width, width]
        self.up = nn.ModuleList(
            _double(2 * side, side, out)
            for side, out in zip(sides[-2::-1], outs, strict=True)
        )
        self.head = nn.Conv2d(width, channels, 1)

    def forward(self, puzzles):
        features = self.down[0](puzzles)  # (b, width, h, w)
        skips = []
        for block in self.down[1:]:
            skips.append(features)
            features = block(F.max_pool2d(features, 2))
        # (b, 8 * width, h / 16, w / 16)
        for block in self.up:
            skip = skips.pop()
            features = F.interpolate(
                features, scale_factor=2, mode="bilinear", align_corners=True
            )
            features = torch.cat([skip, _pad_like(features, skip)], dim=1)
            features = block(features)
        return self.head(features)  # (b, c, h, w)


def _pad_like(features, skip):
    """Pad features by zeros on all sides to the size of others."""
    more = [b - a for a, b in zip(features.shape[2:], skip.shape[2:], strict=True)]
    if not any(more):
        return features
    return F.pad(features, [n for m in reversed(more) for n in (m // 2, m - m // 2)])


class FeatureCritic(nn.Module):
    """DCGAN's discriminator, which halves an image down to 4 pixels or fewer.

    Parameters
    ----------
    channels : int
        Number of channels of the images.
    width : int
        Number of channels of the first layer; each further one doubles them.
    size : tuple of int
        Height and width of the images. The shorter side counts; images of fewer than
        16 pixels a side are padded by replication.
    """

    def __init__(self, channels, width, size):
        super().__init__()
        size = [max(SMALLEST_SIDE, side) for side in size]
        n_layers = 0
        while min(size) > CRITIC_SIDE:
            size = [side // 2 for side in size]
            n_layers += 1
        widths = [width * 2**i for i in range(n_layers)]
        layers = [_strided(channels, width), nn.LeakyReLU(0.2, True)]
        for wide, narrow in itertools.pairwise(widths):
            norm = nn.BatchNorm2d(narrow)
            nn.init.normal_(norm.weight, 1.0, 0.02)
            layers += [_strided(wide, narrow), norm, nn.LeakyReLU(0.2, True)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[-1], 1, size, bias=False)
        nn.init.normal_(self.head.weight, 0.0, 0.02)

    def features(self, images):
        """Return what the classifier sees: (b, c', h', w')."""
        return self.layers(pad_to_multiple(images, 1, minimum=SMALLEST_SIDE))

    def forward(self, images):
        """Return a logit an image: (b, 1, 1, 1), positive where it looks real."""
        return self.head(self.features(images))


def _strided(wide, narrow):
    convolution = nn.Conv2d(wide, narrow, 4, stride=2, padding=1, bias=False)
    nn.init.normal_(convolution.weight, 0.0, 0.02)
    return convolution


class _Plateau:
    """Lowers a learning rate where the error of the epochs no longer falls.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Whose rate it is.
    errors : list of torch.Tensor
        Errors of the batches of an epoch, which the losses fill in.
    """

    def __init__(self, optimizer, errors):
        self.errors = errors
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **PLATEAU)

    def step(self):
        """Take the errors of an epoch."""
        error = Processes().mean(torch.stack(self.errors).mean())
        self.errors.clear()
        self.schedule.step(float(error))

    def state_dict(self):
        """Return what is needed to go on."""
        return self.schedule.state_dict()

    def load_state_dict(self, state):
        """Go on from a state that `state_dict` has returned."""
        self.schedule.load_state_dict(state)


class PuzzleAE(NetworkDetector):
    """Puzzle-AE: put the shuffled tiles of an image in order again.

    A U-Net learns on normal images to solve puzzles of four tiles, one of them grey,
    that were disturbed against it. An image is anomalous where the solutions of its
    puzzles differ from it, each relative to the error usual for its permutation.

    Parameters
    ----------
    permutations : {"all", "transpositions"}, default="all"
        Permutations of the tiles in training and in prediction: all 23, or, for
        textures, the 6 that exchange two tiles.
    epsilon : float, default=0.01
        Largest disturbance of a pixel in training; 0 disturbs none. The code has 0.04
        for CIFAR-10, 0.07 for medical images and 0.1 for MNIST.
    attack : {"solution", "puzzle"}, default="solution"
        Which error the disturbance is to increase: that of the solution, as training
        has it, or, as in the public code, the difference of the solution from the
        puzzle itself; the random start of the disturbance is then added twice.
    feature_weight : float, default=0.02
        Weight of the difference of the critic's features. With 0 there is no critic.
    zoom : tuple of float or None, default=(1.05, 1.2)
        Range of the factors by which three in four training images are enlarged. None
        enlarges none.
    cost_fraction : float, default=0.1
        Share of the training images, at least one, that are not trained on: from them
        come the usual errors of the permutations.
    width : int, default=64
        Number of channels of the first layer; deeper layers have up to eight times as
        many.
    critic_width : int, default=64
        Number of channels of the critic's first layer.
    image_score : {"mean", "max"}, default="mean"
        Score of an image: the mean of its relative errors, or the maximum of its map.
    smoothing_size : int, default=21
        Side length of the mean filter of the maps, in pixels of an image of 256 pixels.
        Scaled with the size of the images it becomes an odd number, from 3 on; 1 leaves
        them as they are.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.
    max_epochs : int, default=3000
        Largest number of passes over the training images.
    learning_rate : float, default=1e-3
        Learning rate of Adam, reduced by a fifth after 50 epochs without a lower error.
        That of the critic is a fifth of it and stays.
    batch_size : int, default=8
        Number of images a batch, in training and in prediction.
    validation_fraction : float, default=0.1
        Share of the training images that is held out if there is an early stop.
    n_iter_no_change : int or None, default=None
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
        Seed of the initial weights, the order of the images, the puzzles and the choice
        of the images that are not trained on.
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
    network_ : torch.nn.ModuleDict
        The trained solver of puzzles, and the critic if there is one.
    permutation_costs_ : numpy.ndarray of shape (n_permutations,)
        Mean squared error for each permutation, of the images not trained on.
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
    RIAD : Hides square cells instead of moving tiles.
    SCADN : Hides stripes instead of moving tiles.

    Notes
    -----
    A map is the mean over the permutations of the squared error of the solution,
    averaged over the channels and divided by the cost of the permutation. Before it is
    smoothed, its mean is the score of the image.

    The images for the costs are chosen by the seed of the fit before anything else is
    done with the images; those that an early stop holds out are others. Costs,
    ``offset_`` and ``map_threshold_`` come from images as they are, neither enlarged
    nor disturbed nor grey in part; both thresholds from all training images.

    The paper's text was not at hand but for its abstract. What is not in it, the
    training above all, follows the public code and may differ from the paper. No
    published figure could be confirmed.
    Departures from the code:

    - Images are scored by the permutations that they were trained on. The code tests
      textures with all 23, and reports the smallest and the largest error of an image
      beside the mean. It has no maps.
    - Costs come from images that were not trained on. In the code, training and test
      draw 25 images each, and enlarged copies of them are trained on.
    - The disturbance is aimed at the error of the solution and starts once;
      ``attack="puzzle"`` is the code's. In both, values outside of [0, 1] may stay
      as they are.
    - Images are enlarged anew in every epoch, about their centre. The code makes three
      enlarged copies of all images once and keeps 800 images.
    - With an early stop, the squared error of the images held out counts, without the
      critic's features. The code has none.
    - The mean training loss includes that of the critic; the reduction of the learning
      rate looks at the squared error only, as in the code.
    - Images are padded by replication to even sides of at least 16 pixels, and the
      solution is cropped. The critic halves them until the shorter side is 4 pixels or
      fewer.

    A prediction solves 23 puzzles an image, or 6. The network copies what is within a
    tile; missing and misplaced parts are found sooner than a fine texture.

    On a processor, images of 64 pixels, ``width=16``, ``epsilon=0``,
    ``permutations="transpositions"``, ``feature_weight=0``, ``zoom=None``,
    ``image_score="max"``, ``batch_size=4``, ``learning_rate=2e-3`` and
    ``max_epochs=300`` are a start for some sixty images. Puzzles take many steps;
    two thousand are few: after 1,570 of them the image and pixel AUROC on 42
    toothbrushes of MVTec AD were 0.77 and 0.91, less than those of the distance to
    the mean image (0.97 and 0.97).

    References
    ----------
    M. Salehi, A. Eftekhar, N. Sadjadi, M. H. Rohban, H. R. Rabiee. "Puzzle-AE: novelty
    detection in images through solving puzzles". 2020. arXiv 2008.12959.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import PuzzleAE
    >>> X = np.random.default_rng(0).uniform(size=(8, 32, 32, 1))
    >>> detector = PuzzleAE(width=4, critic_width=4, max_epochs=2, random_state=0)
    >>> detector.fit(X).localize(X[:2]).shape
    (2, 32, 32)
    """

    _parameter_constraints = {
        **NetworkDetector._parameter_constraints,
        "permutations": [StrOptions({"all", "transpositions"})],
        "epsilon": [Interval(Real, 0, None, closed="left")],
        "attack": [StrOptions({"solution", "puzzle"})],
        "feature_weight": [Interval(Real, 0, None, closed="left")],
        "zoom": [tuple, list, None],
        "cost_fraction": [Interval(Real, 0, 1, closed="neither")],
        "width": [Interval(Integral, 1, None, closed="left")],
        "critic_width": [Interval(Integral, 1, None, closed="left")],
        "image_score": [StrOptions({"mean", "max"})],
        "smoothing_size": [Interval(Integral, 1, None, closed="left")],
    }

    _weight_decay = 1e-5

    _judged_by = ("image_score", "smoothing_size")

    def __init__(
        self,
        *,
        permutations="all",
        epsilon=0.01,
        attack="solution",
        feature_weight=0.02,
        zoom=(1.05, 1.2),
        cost_fraction=0.1,
        width=64,
        critic_width=64,
        image_score="mean",
        smoothing_size=21,
        image_shape=None,
        max_epochs=3000,
        learning_rate=1e-3,
        batch_size=8,
        validation_fraction=0.1,
        n_iter_no_change=None,
        contamination=0.01,
        precision="float32",
        device="auto",
        random_state=None,
        warm_start=False,
        checkpoint=None,
        checkpoint_every=10,
        verbose=0,
    ):
        self.permutations = permutations
        self.epsilon = epsilon
        self.attack = attack
        self.feature_weight = feature_weight
        self.zoom = zoom
        self.cost_fraction = cost_fraction
        self.width = width
        self.critic_width = critic_width
        self.image_score = image_score
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

    def _build_network(self):
        *size, channels = self.image_shape_
        parts = {"solver": PuzzleSolver(channels, self.width)}
        if self.feature_weight:
            parts["critic"] = FeatureCritic(channels, self.critic_width, size)
        return nn.ModuleDict(parts)

    def _optimizer(self, part):
        if isinstance(part, PuzzleSolver):
            return super()._optimizer(part)
        return torch.optim.Adam(
            part.parameters(), lr=self.learning_rate / 5, betas=(0.5, 0.999), fused=True
        )

    def _check_settings(self):
        if self.zoom is None:
            return
        are_numbers = all(isinstance(z, Real) and math.isfinite(z) for z in self.zoom)
        if (
            len(self.zoom) != 2
            or not are_numbers
            or not 1 <= self.zoom[0] <= self.zoom[1]
        ):
            raise ValueError(
                f"zoom={self.zoom!r} must be two numbers >= 1, the smaller one first, "
                "or None."
            )

    def _learn(self, images, labels, progress):
        self._begin(images.device, progress)
        trained_on, held_out = self._hold_out(images)
        errors = []  # of the batches of an epoch
        self._train(
            Samples(trained_on, device=images.device),
            progress,
            losses=partial(self._losses, errors=errors),
            scheduler=partial(self._plateau, errors=errors),
        )
        self.permutation_costs_ = self._costs(held_out)
        return self._evaluate(images, maps_wanted=True)

    def _hold_out(self, images):
        """Return the images to train on and those for the costs."""
        n_held_out = round(self.cost_fraction * len(images))
        n_held_out = min(max(1, n_held_out), len(images) - 1)
        draws = seeded_generator(self._seed)
        order = torch.randperm(len(images), generator=draws).numpy()
        return [
            ImageBatches(images.array, images.device, np.sort(images.rows[chosen]))
            for chosen in (order[n_held_out:], order[:n_held_out])
        ]

    def _plateau(self, optimizer, errors):
        is_of_solver = optimizer is self._optimizers.get(self.network_["solver"])
        return _Plateau(optimizer, errors) if is_of_solver else None

    def _costs(self, images):
        """Return the mean error of images for each permutation: (n_permutations,)."""
        total = 0.0
        for _, errors in self._in_batches(images, self._errors):
            total = total + errors.mean(dim=(2, 3)).sum(dim=0)
        return (total / len(images)).cpu().numpy()

    def _losses(self, network, batch, errors=None):
        solver, draws = network["solver"], batch.generator
        images = self._enlarged(batch.images, draws)
        puzzles = self._disturbed(solver, images, self._puzzles(images, draws), draws)
        solved = _solve(solver, puzzles, images)
        error = F.mse_loss(solved, images)
        if not network.training:
            yield solver, error
            return
        if errors is not None:
            errors.append(error.detach())
        if not self.feature_weight:
            yield solver, error
            return
        critic = network["critic"]
        # both losses look at the critic as it is before its step
        of_critic = critic_loss(critic, images, solved.detach())
        with torch.no_grad():
            wanted = critic.features(images).float()
        found = critic.features(solved).float()
        yield solver, error + self.feature_weight * F.mse_loss(found, wanted)
        yield critic, of_critic

    def _enlarged(self, images, draws):
        """Return images of which some were enlarged."""
        if self.zoom is None:
            return images
        drawn = torch.rand(len(images), 2, generator=draws)
        chosen = torch.nonzero(drawn[:, 0] < ZOOM_PROBABILITY)[:, 0]
        if not len(chosen):
            return images
        smallest, largest = self.zoom
        factors = smallest + (largest - smallest) * drawn[chosen, 1]
        enlarged = enlarge(images[chosen], factors)
        return images.index_copy(0, chosen.to(images.device), enlarged)

    def _puzzles(self, images, draws):
        """Return puzzles with a grey tile, all of one permutation: (b, c, H, W)."""
        permutations = permutations_of_tiles(self.permutations)
        drawn = int(torch.randint(len(permutations), (), generator=draws))
        slot = int(torch.randint(4, (), generator=draws))
        return grey_tile(shuffle_tiles(_frames(images), permutations[drawn]), slot)

    def _disturbed(self, solver, images, puzzles, draws):
        def of_solution(point, started):
            return F.mse_loss(_solve(solver, point, images), images)

        def of_puzzle(point, started):
            return (solver(point).float() - started).square().sum(dim=1).mean()

        is_of_puzzle = self.attack == "puzzle"
        return disturb(
            puzzles,
            of_puzzle if is_of_puzzle else of_solution,
            self.epsilon,
            starts_twice=is_of_puzzle,
            generator=draws,
        )

    def _errors(self, images, generator):
        """Return the errors of all permutations: (b, n_permutations, h, w)."""
        frames = _frames(images)
        n_together = PIXELS_TOGETHER // frames[:, 0].numel()
        errors = []
        for some in _runs(permutations_of_tiles(self.permutations), n_together):
            puzzles = torch.cat([shuffle_tiles(frames, p) for p in some])
            solved = _solve(self.network_["solver"], puzzles, images)
            solved = solved.unflatten(0, (len(some), -1))  # (n, b, c, h, w)
            errors.append((solved - images).square().mean(dim=2))
        return torch.cat(errors).movedim(0, 1)

    def _judge(self, images, *, maps_wanted, generator):
        errors = self._errors(images, generator)
        costs = shared_tensor(self.permutation_costs_).to(errors.device)
        # a perfect solver costs nothing
        costs = costs.clamp(min=SMALLEST_COST)[:, None, None]
        unsmoothed = (errors / costs).mean(dim=1)  # (b, h, w)
        size = scaled_size(self.smoothing_size, unsmoothed)
        maps = mean_filter(unsmoothed, size, padding="none")
        if self.image_score == "max":
            return maps.amax(dim=(1, 2)), maps
        return unsmoothed.mean(dim=(1, 2)), maps


def _frames(images):
    """Return images padded to sides that can be halved."""
    return pad_to_multiple(images, 2, minimum=SMALLEST_SIDE)


def _solve(solver, puzzles, images):
    """Return solutions (b, c, h, w) of the size of images, in float32."""
    height, width = images.shape[-2:]
    return solver(puzzles)[..., :height, :width].float()


def _runs(items, length):
    """Return lists of neighbours, none longer than a length that is at least 1."""
    length = max(1, length)
    return [items[i : i + length] for i in range(0, len(items), length)]
