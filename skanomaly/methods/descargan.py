"""DeScarGAN: disease-specific anomaly detection (Wolleb et al., MICCAI 2020).

From healthy and diseased images, told apart by labels only, a generator learns to turn
any image into a healthy and into a diseased version of itself, against a critic of each
class. What must change to make an image look healthy is what is anomalous in it.
"""

import math
from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

from .._fitting.batches import ImageBatches
from .._fitting.loop import Samples
from .._map_scores import MapScoredDetector
from .._tensors.losses import gradient_penalty
from .._tensors.networks import instance_norm, pad_to_multiple
from .._validation import required_labels

MAX_GRADIENT_NORM = 10.0


def _unit(wide, narrow):
    convolution = nn.Conv2d(wide, narrow, 3, padding=1)
    return [convolution, instance_norm(narrow), nn.ReLU(inplace=True)]


def _initialise(network, draw_weights):
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            draw_weights(layer.weight)
            nn.init.zeros_(layer.bias)


class TwoHeadedGenerator(nn.Module):
    """U-Net without its topmost skip, with a healthy and a diseased head."""

    def __init__(self, channels, width):
        super().__init__()
        sides = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(
            nn.Sequential(*_unit(wide, narrow), *_unit(narrow, narrow))
            for wide, narrow in zip([channels, *sides[:-1]], sides, strict=True)
        )
        self.up = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2), *_unit(2 * side, side))
            for side in sides[-2::-1]
        )
        self.merge = nn.ModuleList(
            nn.Sequential(*_unit(2 * side, side), *_unit(side, side))
            for side in sides[-2:0:-1]
        )
        self.healthy, self.diseased = (
            nn.Sequential(
                *_unit(width, width),
                nn.Conv2d(width, channels, 3, padding=1),
                nn.Tanh(),
            )
            for _ in range(2)
        )
        _initialise(self, nn.init.kaiming_normal_)

    def forward(self, images):
        """Return the healthy and the diseased version (b, c, h, w), in [-1, 1]."""
        height, width = images.shape[-2:]
        features = self.down[0](pad_to_multiple(images, 8, minimum=16))
        skips = []
        for block in self.down[1:]:
            features = block(F.max_pool2d(features, 2))
            skips.append(features)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=False):
            features = merge(torch.cat([up(features), skips.pop()], dim=1))
        features = self.up[-1](features)
        return tuple(
            head(features)[..., :height, :width]
            for head in (self.healthy, self.diseased)
        )


class ThreeHeadedCritic(nn.Module):
    """Critics of healthy and of diseased images, and a classifier, on one trunk.

    Parameters
    ----------
    channels : int
        Number of channels of the images.
    width : int
        Number of channels of the first layer; the heads have up to 16 times as many.
    n_pools : int
        Number of halvings of the images, from 1 to 5.
    """

    def __init__(self, channels, width, n_pools):
        super().__init__()
        stages = [
            [width],
            [2 * width],
            [4 * width, 4 * width],
            [8 * width, 8 * width],
            [8 * width, 8 * width],
        ][:n_pools]
        self.stride = 2**n_pools
        layers, wide = [], channels
        for stage in stages:
            for narrow in stage:
                layers += _plain_unit(wide, narrow)
                wide = narrow
            layers.append(nn.MaxPool2d(2))
        self.trunk = nn.Sequential(*layers, *_plain_unit(wide, 2 * wide))
        wide = 2 * wide
        self.healthy, self.diseased = (
            nn.Sequential(
                *_plain_unit(wide, wide),
                *_plain_unit(wide, wide),
                nn.Conv2d(wide, 1, 1),
            )
            for _ in range(2)
        )
        self.classifier = nn.Sequential(
            *_plain_unit(wide, wide),
            *_plain_unit(wide, wide),
            GridMaxPool(4),
            nn.Flatten(),
            nn.Linear(16 * wide, 64),
            nn.ReLU(inplace=True),
        )
        self.dropout = Dropout(0.1)
        self.head = nn.Linear(64, 2)
        _initialise(self, nn.init.xavier_normal_)

    def forward(self, images):
        """Return features that all heads take."""
        return self.trunk(pad_to_multiple(images, self.stride))

    def classify(self, features, generator):
        """Return the logits (b, 2) of the healthy and the diseased class."""
        return self.head(self.dropout(self.classifier(features), generator))


class GridMaxPool(nn.Module):
    """Maxima of a grid of cells, which may overlap by a row or a column.

    The cells are those of ``nn.AdaptiveMaxPool2d``, whose gradient depends on chance on
    a GPU, and which ONNX does not have.
    """

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, features):
        """Return the maxima (b, c, side, side) of features (b, c, h, w)."""
        for axis in (2, 3):
            length = features.shape[axis]
            starts = [i * length // self.side for i in range(self.side)]
            stops = [-(-(i + 1) * length // self.side) for i in range(self.side)]
            features = torch.cat(
                [
                    features.narrow(axis, start, stop - start).amax(axis, keepdim=True)
                    for start, stop in zip(starts, stops, strict=True)
                ],
                dim=axis,
            )
        return features


class Dropout(nn.Module):
    """Dropout that draws from a generator on the CPU, while it is trained."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, features, generator):
        """Return features (b, d), of which some are zero and the others grown."""
        if not self.training:
            return features
        kept = torch.rand(features.shape, generator=generator) >= self.rate
        return features * kept.to(features.device) / (1 - self.rate)


def _plain_unit(wide, narrow):
    return [nn.Conv2d(wide, narrow, 3, padding=1), nn.ReLU(inplace=True)]


class DeScarGAN(MapScoredDetector):
    """DeScarGAN: make an image look healthy and see what changes.

    It learns from healthy and from diseased images, by a label for each and no masks. A
    generator learns to make healthy and diseased versions of images; a map is the
    difference between an image and its healthy version.

    Parameters
    ----------
    n_critic : int, default=5
        Number of steps of the critic for each of the generator.
    width : int, default=64
        Number of channels of the generator's first layer; the inner layers have eight
        times as many.
    critic_width : int, default=32
        Number of channels of the critic's first layer.
    critic_learning_rate : float, default=None
        Learning rate of the critic. None takes ``learning_rate``.
    cycle_weight, identity_weight : float, default=50.0
        Weights of the squared differences between an image and what the generator makes
        of its version of the other class, and of its own class.
    penalty_weight : float, default=10.0
        Weight of the gradient penalty of the critics.
    noise : float, default=0.05
        Largest value of the uniform noise that is added to training images.
    flip : bool, default=True
        Whether training images are mirrored left to right with probability one half.
    image_score : {"classifier", "mean", "max"}, default="classifier"
        What the score of an image is: "classifier" is the probability of the diseased
        class, as in the paper; "mean" is the mean of the raw map, before anything is
        subtracted or smoothed; "max" is the maximum of the map, which finds small
        defects.
    smoothing_size : int, default=1
        Side length of the mean filter of the maps, in pixels of an image of 256 pixels.
        Scaled with the size of the images it becomes an odd number, from 3 on; 1 leaves
        them as they are.
    reference : {"none", "training"}, default="none"
        What is subtracted from the maps: nothing, or the mean map of the healthy
        training images.
    image_shape : tuple of int, default=None
        Shape (H, W) or (H, W, C) of images given as rows. None takes a square number of
        features for a square grey image, any other number for an image of one line.
    max_epochs : int, default=500
        Largest number of passes over the training images.
    learning_rate : float, default=1e-4
        Learning rate of Adam.
    batch_size : int, default=10
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
        Seed of the initial weights, the order of the images and the noise.
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
        The trained generator and critic.
    mean_map_ : numpy.ndarray of shape (H, W)
        Mean map of the healthy training images before it is smoothed; only with
        ``reference="training"``.
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
    PNet : Needs healthy images only.

    Notes
    -----
    Departures from the paper and its code:

    - The generator sees no label, as in the figure of the paper; one pass makes both
      versions. It has instance normalisation, which is what the code's batch
      normalisation of single images does when it scores, and none before the last
      hyperbolic tangent. These are 1,152 and 4 parameters less.
    - The penalty is that of the mean over the patches, which the code sums, so that it
      does not depend on the size of the images. It stands outside the weight of the
      critics' loss, as in the code. With the sum the critic is less steep by the
      number of patches; on ``make_ellipses``, with one seed, the generator then copied
      images and changed little.
    - Patches are as many as in the figure; the code pads them.
    - In each batch, which is drawn from all images, both classes count alike in the
      losses on real images, in cycle and in identity, however many images they have.
      Versions count as often as they are made, as in the code.
    - The generator's first step comes with the critic's first. A learning rate of the
      critic's own is no part of the paper.
    - Maps are differences of grey levels as they are; the code scales both images to
      the same range first. ``smoothing_size``, ``reference`` and the maximum of the map
      are no part of the paper.
    - ``noise`` is that of values in [-1, 1], to which images are brought. The weights
      of the critics' losses that are no parameters, 20 for the adversarial one and 5
      and 1 for the classification of real and of generated images, are the code's.
    - Images are flipped from left to right only; the code flips them upside down, too,
      although bodies have an up.
    - Thresholds come from the healthy training images.
    - The critic halves the image until its shorter side is about 8 pixels, up to five
      times; for 256 pixels it is that of the paper. Images are padded by replication.

    On a processor, 400 images of 64 pixels, ``width=12``, ``critic_width=12``,
    ``n_critic=2``, ``batch_size=4``, ``learning_rate=1e-3``,
    ``critic_learning_rate=5e-4``, ``cycle_weight`` and ``identity_weight`` of 25 and
    ``max_epochs=64`` are a start, of a quarter of an hour. Smoothed maps may tell the
    place of an anomaly where raw ones do not: on ``make_ellipses``
    ``smoothing_size=68`` raised the pixel AUROC from 0.68 to 0.93, and
    ``image_score="max"`` of such maps is a second opinion to the classifier. Look at
    them: after a training on 152 images of brains they pointed at the tumour in two of
    six new ones. A classifier that gives all images the same probability wants a
    smaller rate; the maps may be good nevertheless. Where copies of fine detail are
    poor, the generator may learn to copy first: on 4,000 images ``n_critic=1`` and both
    weights 1e4 for two epochs, then, with ``warm_start=True``, ``n_critic=2`` and both
    weights 100 had the best maps.
    Cross-validation and searches need both classes in each training, as
    scikit-learn's ``StratifiedKFold`` keeps them.

    References
    ----------
    J. Wolleb, R. Sandkühler, P. Cattin. "DeScarGAN: disease-specific anomaly detection
    with weak supervision". MICCAI 2020. arXiv 2007.14118.

    Examples
    --------
    >>> import numpy as np
    >>> from skanomaly import DeScarGAN
    >>> X = np.random.default_rng(0).uniform(size=(8, 32, 32, 1))
    >>> y = [1, 1, 1, 1, -1, -1, -1, -1]
    >>> detector = DeScarGAN(width=4, critic_width=4, n_critic=1, max_epochs=2)
    >>> detector.fit(X, y).transform_to_healthy(X[:2]).shape
    (2, 32, 32, 1)
    """

    _parameter_constraints = {
        **MapScoredDetector._parameter_constraints,
        "n_critic": [Interval(Integral, 1, None, closed="left")],
        "width": [Interval(Integral, 1, None, closed="left")],
        "critic_width": [Interval(Integral, 1, None, closed="left")],
        "critic_learning_rate": [Interval(Real, 0, None, closed="neither"), None],
        "cycle_weight": [Interval(Real, 0, None, closed="left")],
        "identity_weight": [Interval(Real, 0, None, closed="left")],
        "penalty_weight": [Interval(Real, 0, None, closed="left")],
        "noise": [Interval(Real, 0, None, closed="left")],
        "flip": ["boolean"],
        "image_score": [StrOptions({"classifier", "mean", "max"})],
    }

    def __init__(
        self,
        *,
        n_critic=5,
        width=64,
        critic_width=32,
        critic_learning_rate=None,
        cycle_weight=50.0,
        identity_weight=50.0,
        penalty_weight=10.0,
        noise=0.05,
        flip=True,
        image_score="classifier",
        smoothing_size=1,
        reference="none",
        image_shape=None,
        max_epochs=500,
        learning_rate=1e-4,
        batch_size=10,
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
        self.n_critic = n_critic
        self.width = width
        self.critic_width = critic_width
        self.critic_learning_rate = critic_learning_rate
        self.cycle_weight = cycle_weight
        self.identity_weight = identity_weight
        self.penalty_weight = penalty_weight
        self.noise = noise
        self.flip = flip
        self.image_score = image_score
        self.smoothing_size = smoothing_size
        self.reference = reference
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

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags

    def transform_to_healthy(self, X: ArrayLike) -> NDArray[np.float32]:
        """Return what images would look like if they were healthy.

        Parameters
        ----------
        X : array-like of shape (n, H, W, C), (n, H, W) or (n, H * W * C)
            Images of the shape seen in fit.

        Returns
        -------
        numpy.ndarray of shape (n, H, W, C)
            Healthy versions, float32 in [0, 1].
        """
        fitted, images = self._prepare(X)
        result = np.empty((len(images), *self.image_shape_), np.float32)
        for rows, healthy in fitted._in_batches(
            images, lambda batch, generator: fitted._make_healthy(batch)
        ):
            result[rows] = healthy.permute(0, 2, 3, 1).cpu().numpy()
        return result

    def _build_network(self):
        *size, channels = self.image_shape_
        n_pools = min(5, max(1, round(math.log2(min(size) / 8))))
        return nn.ModuleDict(
            {
                "generator": TwoHeadedGenerator(channels, self.width),
                "critic": ThreeHeadedCritic(channels, self.critic_width, n_pools),
            }
        )

    def _optimizer(self, part):
        rate = self.learning_rate
        if self.critic_learning_rate is not None and part is self.network_["critic"]:
            rate = self.critic_learning_rate
        parameters = list(part.parameters())
        optimizer = torch.optim.Adam(
            parameters, lr=rate, betas=(0.5, 0.999), fused=True
        )

        def clip_gradients(*_):
            nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)

        optimizer.register_step_pre_hook(clip_gradients)
        return optimizer

    def _check_y(self, y, n_samples):
        if y is None:
            raise ValueError(
                "DeScarGAN learns from healthy and diseased images and requires y to "
                "be passed, but the target y is None. Labels are +1 for healthy and -1 "
                "for diseased images."
            )
        labels = required_labels(y, n_samples)
        if len(np.unique(labels)) < 2:
            raise ValueError(
                "y must hold both healthy (+1) and diseased (-1) images, but all "
                f"{n_samples} are {labels[0]:+d}. In a search, StratifiedKFold keeps "
                "both; OneClassKFold trains on normal images alone."
            )
        return labels

    def _training_images(self, X, labels):
        images, _ = super()._training_images(X, None)
        return images, labels

    def _learn(self, images, labels, progress):
        self._begin(images.device, progress)
        self._train(Samples(images, labels, device=images.device), progress)
        rows = np.flatnonzero(labels == 1)
        healthy = ImageBatches(images.array, images.device, rows)
        self._survey(healthy)
        return self._evaluate(healthy, maps_wanted=True)

    def _losses(self, network, batch):
        generator, critic = network["generator"], network["critic"]
        healthy = batch.labels == 1
        weights = _class_weights(healthy)
        images, draws = 2 * batch.images - 1, batch.generator
        if self.flip:
            mirrored = torch.rand(len(images), 1, 1, 1, generator=draws) < 0.5
            mirrored = mirrored.to(images.device)
            images = torch.where(mirrored, images.flip(3), images)
        # the same noise on real and generated images tells the critics nothing
        noise = torch.rand(images.shape, generator=draws).to(images.device)
        noise = self.noise * noise
        images = images + noise
        trains_generator = batch.step % self.n_critic == 0
        with torch.set_grad_enabled(trains_generator):
            made = [version + noise for version in generator(images)]

        features = critic(images)
        logits = critic.classify(features, draws)
        loss = 5 * _classification_loss(logits, healthy, weights)
        for head, own, version in (
            (critic.healthy, healthy, made[0]),
            (critic.diseased, ~healthy, made[1]),
        ):
            fake = version.detach()
            on_real = (_scores(head, features) * weights)[own].sum()
            on_fake = _scores(head, critic(fake)).mean() * weights[own].sum()
            penalty = gradient_penalty(
                lambda points, head=head: head(critic(points)),
                images,
                fake,
                generator=draws,
            )
            loss = loss + 20 * (on_fake - on_real) + self.penalty_weight * penalty
        yield critic, loss

        if not trains_generator:
            return
        is_healthy = healthy[:, None, None, None]
        own = torch.where(is_healthy, *made)
        other = torch.where(is_healthy, *reversed(made))
        back = torch.where(is_healthy, *generator(other)) + noise
        loss = self.identity_weight * _sum_of_class_errors(own, images, healthy)
        loss = loss + self.cycle_weight * _sum_of_class_errors(back, images, healthy)
        for head, version, is_target in zip(
            (critic.healthy, critic.diseased), made, (True, False), strict=True
        ):
            features = critic(version)
            target = torch.full_like(healthy, is_target)
            loss = loss - _scores(head, features).mean()
            logits = critic.classify(features, draws)
            loss = loss + _classification_loss(logits, target, None)
        yield generator, loss

    def _make_healthy(self, images):
        """Return the healthy versions of images, values in [0, 1]."""
        healthy, _ = self.network_["generator"](2 * images - 1)
        return (healthy.float() + 1) / 2

    def _judge(self, images, *, maps_wanted, generator):
        if self.image_score == "classifier" and not maps_wanted:
            return self._classify(images, generator), None
        return super()._judge(images, maps_wanted=maps_wanted, generator=generator)

    def _raw(self, images, generator):
        maps = (images - self._make_healthy(images)).abs().mean(dim=1)
        if self.image_score == "classifier":
            return self._classify(images, generator), maps
        return maps.mean(dim=(1, 2)), maps

    def _classify(self, images, generator):
        """Return the probabilities (b,) of the diseased class."""
        critic = self.network_["critic"]
        logits = critic.classify(critic(2 * images - 1), generator)
        return logits.float().softmax(dim=1)[:, 1]


def _class_weights(healthy):
    """Return weights that give each class of a batch the same sum, 1 / 2."""
    counts = torch.where(healthy, healthy.sum(), (~healthy).sum())
    n_classes = 1 + (healthy.any() & ~healthy.all()).int()
    return 1 / (n_classes * counts)


def _scores(head, features):
    """Return a critic's mean score of each image: (b,)."""
    return head(features).float().flatten(1).mean(dim=1)


def _classification_loss(logits, healthy, weights):
    """Return the cross-entropy against healthy (class 0) or diseased (class 1)."""
    losses = F.cross_entropy(logits.float(), (~healthy).long(), reduction="none")
    return losses.mean() if weights is None else (losses * weights).sum()


def _sum_of_class_errors(images, targets, healthy):
    """Return the mean squared error of healthy images plus that of diseased ones."""
    errors = (images.float() - targets).square().flatten(1).mean(dim=1)
    return (errors / torch.where(healthy, healthy.sum(), (~healthy).sum())).sum()
