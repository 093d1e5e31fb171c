import math

import numpy as np
import pytest
import torch
from method_settings import TRAINED_BRIEFLY
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score
from torch import nn

from skanomaly.methods import fcdd
from skanomaly.methods.fcdd import FCDD, FCDDNetwork
from skanomaly.onnx import export

SMALL = {
    "FCDD": {
        "architecture": "cnn32",
        "width": 8,
        "weights": None,
        "optimizer": "adam",
        "batch_size": 8,
        **TRAINED_BRIEFLY,
    }
}
# of two pixels, the normalisation leaves only which is the brighter: all outliers that
# scikit-learn makes would look like some normal image
TINY = {"FCDD": {"width": 2, "local_contrast": False}}

# paper's size of images and their channels, parameters, cells, receptive field
PAPER = {
    "vgg11": (224, 3, 4_504_833, 28, (62, 8, 3.5)),
    "cnn224": (224, 3, 247_569, 28, (59, 8, 0.0)),
    # without a batch normalisation that the code never calls
    "cnn32": (32, 3, 1_185_537 - 256, 8, (22, 4, 1.5)),
    "cnn28": (28, 1, 413_441, 7, (16, 4, 1.5)),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def striped(n, size=32, seed=0):
    rng = np.random.default_rng(seed)
    stripes = 0.5 + 0.3 * np.sin(np.arange(size) * np.pi / 4)
    images = stripes[:, None, None] + rng.normal(0, 0.03, (n, size, size, 3))
    return images.clip(0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def fitted(small):
    return small(FCDD, max_epochs=3).fit(striped(12))


# The networks


@pytest.mark.parametrize("name", PAPER)
def test_parameters_cells_and_receptive_fields_of_the_paper(name):
    size, channels, n_parameters, n_cells, field = PAPER[name]
    with torch.device("meta"):
        network = FCDDNetwork(name, channels, None)
        maps = network(torch.empty(2, channels, size, size))
    assert count_parameters(network) == n_parameters
    assert maps.shape == (2, n_cells, n_cells)
    assert network.field == field


def test_the_arithmetic_of_receptive_fields():
    """Against the gradient of a cell, which shows what it sees."""
    layers = [nn.Conv2d(1, 1, 5, 2, 1), nn.AvgPool2d(1), nn.MaxPool2d(3, 2, 1)]
    layers += [nn.Conv2d(1, 1, 3)]
    seen = [nn.AvgPool2d(3, 2, 1) if i == 2 else m for i, m in enumerate(layers)]
    image = torch.zeros(1, 1, 64, 64, requires_grad=True)
    nn.Sequential(*seen)(image)[0, 0, 3, 4].backward()
    rows, columns = (image.grad[0, 0].abs().sum(dim=i).nonzero() for i in (1, 0))
    size, stride, start = fcdd.receptive_field(layers)
    for index, places in ((3, rows), (4, columns)):
        assert places.max() - places.min() + 1 == size
        assert (places.max() + places.min()) / 2 == start + stride * index


def restated(name, channels, width):
    """Return the networks as the sheet lists them, and torchvision's kind of units."""
    w = width

    def unit(wide, narrow, kernel=3, is_vgg=False):
        return [
            nn.Conv2d(wide, narrow, kernel, padding=kernel // 2),
            nn.BatchNorm2d(narrow, eps=1e-5 if is_vgg else 1e-4),
            nn.ReLU() if is_vgg else nn.LeakyReLU(0.01),
        ]

    def vgg(wide, narrow):
        return unit(wide, narrow, is_vgg=True)

    return {
        "vgg11": lambda: [
            *(*vgg(channels, w), nn.MaxPool2d(2)),
            *(*vgg(w, 2 * w), nn.MaxPool2d(2)),
            *(*vgg(2 * w, 4 * w), *vgg(4 * w, 4 * w), nn.MaxPool2d(2)),
            *(*vgg(4 * w, 8 * w), *vgg(8 * w, 8 * w)),
            nn.Conv2d(8 * w, 1, 1),
        ],
        "cnn224": lambda: [
            *(*unit(channels, w, 5), nn.MaxPool2d(3, 2, 1)),
            *(*unit(w, 4 * w, 5), nn.MaxPool2d(3, 2, 1)),
            *(*unit(4 * w, 8 * w), *unit(8 * w, 16 * w), nn.MaxPool2d(3, 2, 1)),
            nn.Conv2d(16 * w, 16 * w, 3, padding=1),
            nn.Conv2d(16 * w, 1, 1),
        ],
        "cnn32": lambda: [
            *(*unit(channels, w), nn.MaxPool2d(2)),
            *(*unit(w, 2 * w), *unit(2 * w, 2 * w), nn.MaxPool2d(2)),
            nn.Conv2d(2 * w, w, 3, padding=1),
            nn.Conv2d(w, 1, 1),
        ],
        "cnn28": lambda: [
            *(*unit(channels, w, 5), nn.MaxPool2d(2)),
            *(nn.Conv2d(w, w, 5, padding=2), nn.MaxPool2d(2)),
            nn.Conv2d(w, 1, 1),
        ],
    }[name]()


@pytest.mark.parametrize("name", PAPER)
def test_a_restatement_in_plain_torch_gives_the_same(name):
    torch.manual_seed(0)
    network = FCDDNetwork(name, 3, 4)
    other = nn.Sequential(*restated(name, 3, 4))
    own = network.state_dict()
    assert len(own) == len(other.state_dict())
    other.load_state_dict(dict(zip(other.state_dict(), own.values(), strict=True)))
    images = torch.rand(3, 3, 32, 40)
    for is_training in (True, False):  # the first changes the running statistics
        network.train(is_training), other.train(is_training)
        with torch.no_grad():
            torch.testing.assert_close(
                network(images), other(images)[:, 0], rtol=1e-5, atol=1e-5
            )
    for a, b in zip(own.values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", PAPER)
def test_a_cell_sees_its_receptive_field_only(name):
    torch.manual_seed(0)
    network = FCDDNetwork(name, 1, 2).eval()
    size, stride, start = network.field
    images = torch.rand(1, 1, 16 * stride, 16 * stride)
    row, column = 8, 9
    low, high = (
        round(start + stride * row + side * (size - 1) / 2) for side in (-1, 1)
    )
    left, right = low + stride, high + stride
    outside = torch.rand_like(images)
    outside[..., low : high + 1, left : right + 1] = images[
        ..., low : high + 1, left : right + 1
    ]
    with torch.no_grad():
        given, changed = network(images), network(outside)
        # a step to the right moves the map by a cell
        moved = network(images.roll(stride, dims=3))
    torch.testing.assert_close(
        changed[0, row, column], given[0, row, column], atol=1e-6, rtol=1e-4
    )
    assert (changed != given).float().mean() > 0.9
    margin = -(-size // (2 * stride)) + 1
    inner = slice(margin, -margin)
    torch.testing.assert_close(
        moved[0, inner, margin + 1 : 16 - margin],
        given[0, inner, margin : 15 - margin],
        atol=1e-6,
        rtol=1e-4,
    )


@pytest.mark.parametrize("shape", [(30, 41, 3), (7, 5, 4), (1, 2, 1)])
@pytest.mark.parametrize("name", PAPER)
def test_images_of_any_size(name, shape, small, random_images):
    X = random_images(4, *shape)
    detector = small(FCDD, architecture=name, width=2).fit(X)
    assert detector.localize(X).shape == (4, *shape[:2])


# Pretrained weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return the file of torchvision's VGG, as far as its third pool."""
    import torchvision

    torch.manual_seed(0)
    features = torchvision.models.vgg11_bn(weights=None).features[:15]
    for layer in features:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.2, 0.2)
    path = tmp_path_factory.mktemp("weights") / "vgg11_bn.pth"
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, path)
    return path


def test_pretrained_layers_are_kept_and_their_statistics_go_on(weights, small):
    X = striped(6)[..., :1]  # grey images are taken, too
    settings = {"architecture": "vgg11", "width": None, "weights": weights}
    detector = small(FCDD, **settings).fit(X)
    known, own = torch.load(weights), detector.network_.layers.state_dict()
    assert not torch.equal(own["1.running_mean"], known["features.1.running_mean"])
    frozen = detector.network_.layers[:15]
    assert count_parameters(frozen) == 962_304
    for name, parameter in frozen.named_parameters():
        assert not parameter.requires_grad
        assert torch.equal(parameter, known[f"features.{name}"]), name
    optimizer = detector._optimizer(detector.network_)
    n_trained = sum(p.numel() for p in optimizer.param_groups[0]["params"])
    assert n_trained == 3_542_529
    assert isinstance(optimizer, torch.optim.Adam)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"weights": "nowhere.pth"}, FileNotFoundError, "is not a file"),
        ({"width": 8}, ValueError, "width=8 is not that of pretrained weights"),
        ({"architecture": "cnn28"}, ValueError, "are for architecture='vgg11'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(settings, error, message, weights, small):
    given = {"architecture": "vgg11", "width": None, "weights": weights, **settings}
    with pytest.raises(error, match=message):
        small(FCDD, **given).fit(striped(4))


def test_channels_that_pretrained_weights_do_not_know_are_refused(weights, small):
    X = np.zeros((4, 32, 32, 2))
    with pytest.raises(ValueError, match="2 channels"):
        small(FCDD, architecture="vgg11", width=None, weights=weights).fit(X)


def test_optimisers_and_schedules():
    part = nn.Linear(1, 1)
    detector = FCDD(max_epochs=20)
    optimizer = detector._optimizer(part)
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group["momentum"], group["nesterov"]) == (0.9, True)
    assert (group["lr"], group["weight_decay"]) == (1e-3, 1e-4)

    def last_rate(detector):
        optimizer = detector._optimizer(part)
        scheduler = detector._scheduler(optimizer)
        for _ in range(20):
            optimizer.step()
            scheduler.step()
        return optimizer.param_groups[0]["lr"]

    assert last_rate(detector) == pytest.approx(1e-3 * 0.985**200)
    assert last_rate(detector.set_params(optimizer="adam")) == pytest.approx(1e-5)


# Maps and losses


def test_pseudo_huber():
    x = torch.tensor([0.0, 1e-4, -1e-4, 0.5, -3.0, 1e4])
    found = fcdd.pseudo_huber(x)
    expected = torch.sqrt(x.double() ** 2 + 1) - 1
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=0)
    assert (found[1:] > 0).all()
    assert found[1].item() == pytest.approx(1e-8 / 2, rel=1e-4)
    assert found[-1].item() == pytest.approx(1e4, rel=1e-3)


def test_the_loss_of_images():
    maps = torch.full((2, 3, 3), 0.7)
    yes, no = torch.tensor([True, True]), torch.tensor([False, False])
    both = fcdd.image_loss(maps, torch.tensor([True, False])).item()
    anomalous = -math.log(1 - math.exp(-0.7))
    assert fcdd.image_loss(maps, no).item() == pytest.approx(0.7)
    assert fcdd.image_loss(maps, yes).item() == pytest.approx(anomalous)
    assert both == pytest.approx((0.7 + anomalous) / 2)
    assert fcdd.image_loss(0 * maps, no) == 0
    losses = [fcdd.image_loss(s * maps, yes).item() for s in (0.0, 1e-5, 0.1, 1, 30)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(-math.log(1e-6), rel=1e-4)
    assert losses[1] == pytest.approx(-math.log(7e-6), rel=1e-4)
    assert losses[-1] < 1e-6


def test_small_masks_and_small_scores_are_learned():
    outputs = torch.full((1, 224, 224), 0.14, requires_grad=True)
    masks = torch.zeros(1, 224, 224)
    masks[0, 50:52, 60:62] = 1
    fcdd.pixel_loss(fcdd.pseudo_huber(outputs), masks).backward()
    inside = masks > 0
    assert (outputs.grad[inside] < 0).all()
    assert (outputs.grad[~inside] > 0).all()
    outputs = torch.full((1, 4, 4), 1e-3, requires_grad=True)
    fcdd.image_loss(fcdd.pseudo_huber(outputs), torch.tensor([True])).backward()
    assert (outputs.grad < 0).all()


def test_the_loss_of_pixels():
    maps = torch.rand(2, 4, 5, generator=seeded())
    masks = torch.zeros(2, 4, 5)
    masks[0, 1:3, 2] = 1
    degree = (maps[0] * masks[0]).mean().item()
    expected = (
        (maps[0] * (1 - masks[0])).mean().item()
        - math.log(1 - math.exp(-degree))
        + maps[1].mean().item()
    ) / 2
    assert fcdd.pixel_loss(maps, masks).item() == pytest.approx(expected)
    ones = torch.ones(2, 4, 5)
    assert fcdd.pixel_loss(maps, ones).item() == pytest.approx(
        fcdd.image_loss(maps, torch.tensor([True, True])).item()
    )
    assert fcdd.pixel_loss(maps, 0 * ones).item() == pytest.approx(maps.mean().item())


@pytest.mark.parametrize("name", PAPER)
def test_upsampling_against_a_slow_one(name):
    """A sum over the cells of Gaussians, as scipy makes them of an impulse."""
    field = FCDDNetwork(name, 1, 1).field
    size, sigma, zoom = (41, 48), 1.5 * field.stride, 2  # centres lie between pixels
    cells = tuple(-(-side // field.stride) for side in size)
    maps = torch.rand(2, *cells, generator=seeded())
    margin, half = 64, (field.size - 1) / 2
    kernels = []
    for i, j in np.ndindex(cells):
        plane = np.zeros((zoom * (size[0] + 2 * margin), zoom * (size[1] + 2 * margin)))
        place = tuple(round(zoom * (field.start + field.stride * k)) for k in (i, j))
        plane[place[0] + zoom * margin, place[1] + zoom * margin] = 1
        plane = gaussian_filter(plane, zoom * sigma, radius=round(zoom * half))
        inner = plane[zoom * margin : -zoom * margin, zoom * margin : -zoom * margin]
        kernels.append(inner[::zoom, ::zoom])
    kernels = np.array(kernels)
    sums = np.einsum("bk,kyx->byx", maps.flatten(1).numpy(), kernels)
    found = fcdd.upsample(maps, size, field, sigma)
    np.testing.assert_allclose(found, sums / kernels.sum(axis=0), rtol=1e-4)


def test_upsampling_keeps_constants_and_finds_the_centre():
    field = fcdd.ReceptiveField(62, 8, 3.5)
    flat = fcdd.upsample(torch.full((1, 28, 28), 0.3), (224, 224), field, 12.0)
    torch.testing.assert_close(flat, torch.full((1, 224, 224), 0.3))
    impulse = torch.zeros(1, 28, 28)
    impulse[0, 10, 20] = 1
    found = fcdd.upsample(impulse, (224, 224), field, 12.0)[0]
    rows, columns = (found.sum(dim=i) for i in (1, 0))
    assert {int(i) for i in rows.topk(2).indices} == {83, 84}
    assert {int(i) for i in columns.topk(2).indices} == {163, 164}
    assert int((rows > 0).sum()) == 62


def test_scores_are_means_or_maxima_of_the_cells(fitted):
    X = striped(3, seed=1)
    images = torch.from_numpy(X).permute(0, 3, 1, 2)
    contrast = images - images.mean(dim=(1, 2, 3), keepdim=True)
    contrast = contrast / contrast.abs().mean(dim=(1, 2, 3), keepdim=True)
    low, high = torch.from_numpy(fitted.channel_range_)[:, :, None, None]
    with torch.no_grad():
        outputs = fitted.network_((contrast - low) / (high - low))
    cells = torch.sqrt(outputs**2 + 1) - 1
    scores = fitted.score_samples(X)
    np.testing.assert_allclose(-scores, cells.mean(dim=(1, 2)), rtol=1e-3)
    fitted.set_params(image_score="max")
    np.testing.assert_allclose(
        -fitted.score_samples(X), cells.amax(dim=(1, 2)), rtol=1e-3
    )
    fitted.set_params(image_score="mean")
    expected = fcdd.upsample(cells, (32, 32), fitted.network_.field, 12 * 32 / 224)
    np.testing.assert_allclose(fitted.localize(X), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("local_contrast", [True, False])
def test_the_constants_of_the_normalisation(local_contrast, small):
    X = striped(9)
    detector = small(FCDD, local_contrast=local_contrast, batch_size=4).fit(X)
    images = torch.from_numpy(X).permute(0, 3, 1, 2)
    if local_contrast:
        images = fcdd.normalize_contrast(images)
    np.testing.assert_allclose(
        detector.channel_range_[0], images.amin(dim=(0, 2, 3)), rtol=1e-5
    )
    normal = detector._normalize(torch.from_numpy(X).permute(0, 3, 1, 2))
    np.testing.assert_allclose(normal.amin(dim=(0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(normal.amax(dim=(0, 2, 3)), 1, atol=1e-6)


def test_contrast_is_normalised_image_by_image():
    images = torch.rand(2, 3, 8, 8, generator=seeded())
    found = fcdd.normalize_contrast(images)
    torch.testing.assert_close(found, fcdd.normalize_contrast(0.2 * images + 0.5))
    torch.testing.assert_close(found.mean(dim=(1, 2, 3)), torch.zeros(2))
    torch.testing.assert_close(found.abs().mean(dim=(1, 2, 3)), torch.ones(2))
    flat = fcdd.normalize_contrast(torch.full((1, 1, 4, 4), 0.3))
    assert flat.abs().max() < 1e-3


# Anomalies


def test_statistics_of_confetti():
    changes = fcdd.confetti(60, 1, 240, 240, generator=seeded())
    assert changes.max() == 0
    assert changes.min() >= -511 / 255
    levels = 255 * changes
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    changed = (changes != 0).any(dim=1).flatten(1)
    assert changed.any(dim=1).all()
    # measured on the public code: 13 % of the pixels
    assert changed.float().mean().item() == pytest.approx(0.13, abs=0.015)


def test_a_seed_gives_the_same_confetti():
    first, again, other = (
        fcdd.confetti(3, 2, 40, 30, generator=seeded(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_numbers_of_squares_are_poisson_without_zero():
    for mean, expected in ((fcdd.MEAN_COLOURED, 1.61), (fcdd.MEAN_BLACK, 1.39)):
        numbers = fcdd.blob_numbers(mean, 20_000, generator=seeded())
        assert numbers.min() == 1
        assert numbers.max() <= 6
        assert numbers.float().mean().item() == pytest.approx(expected, abs=0.02)


def test_confetti_are_bright_where_dark_ones_would_not_be_seen():
    changes = fcdd.confetti(3, 3, 48, 48, generator=seeded())
    black, white = torch.zeros(3, 3, 48, 48), torch.ones(3, 3, 48, 48)
    on_black, on_white = (fcdd.add_confetti(x, changes) for x in (black, white))
    assert (on_black.flatten(1).amax(dim=1) > 0).all()
    assert (on_white.flatten(1).amin(dim=1) < 1).all()
    for before, after in ((black, on_black), (white, on_white)):
        assert after.min() >= 0
        assert after.max() <= 1
        assert torch.equal(after[changes == 0], before[changes == 0])
    # what is at hand decides, not what is possible
    grey = torch.full((3, 3, 48, 48), 0.4)
    assert (fcdd.add_confetti(grey, changes) <= grey).all()


def test_half_of_the_images_are_replaced_by_confetti(small):
    detector = small(FCDD, augment=False)
    images = 0.2 + 0.6 * torch.rand(200, 1, 24, 24, generator=seeded())
    found, anomalous, masks = detector._disturb(images, [], seeded())
    assert anomalous.float().mean().item() == pytest.approx(0.5, abs=0.1)
    changed = (found != images).any(dim=1)
    assert torch.equal(changed.float(), masks)
    assert torch.equal(changed.flatten(1).any(dim=1), anomalous)


def test_crops_take_masks_along():
    images = torch.rand(40, 2, 45, 60, generator=seeded())
    found, masks = fcdd.crop(images, images[:, 0], generator=seeded(1))
    assert torch.equal(found[:, 0], masks)
    same = (found == images).flatten(1).all(dim=1)
    assert 0.25 < same.float().mean() < 0.75
    rows = torch.arange(45.0).view(1, 1, 45, 1).expand(40, 1, 45, 60)
    (rows, _) = fcdd.crop(rows, rows[:, 0], generator=seeded(1))
    extent = rows[~same].flatten(1)
    spread = extent.amax(dim=1) - extent.amin(dim=1) + 1
    assert ((spread - 45 * 224 / 240).abs() <= 1).all()
    assert len(extent.amin(dim=1).unique()) > 2


def test_jitter_changes_little():
    images = 0.2 + 0.6 * torch.rand(64, 3, 16, 16, generator=seeded())
    change = (fcdd.jitter(images, generator=seeded()) - images).flatten(1).std(dim=1)
    assert 0.4 < (change > 0.05 * 0.17).float().mean() < 0.9
    assert change.max() < 0.06
    grey = torch.full((8, 3, 4, 4), 0.5)
    assert (fcdd.jitter(grey, generator=seeded()) - 0.5).abs().max() < 0.03


class Recorder(FCDD):
    """Keep what the network is trained on."""

    def _disturb(self, *args):
        drawn = super()._disturb(*args)
        self.samples.append(drawn)
        return drawn


@pytest.fixture
def record(small):
    """Return a function that trains for an epoch and tells on what."""

    def train(X, y=None, **settings):
        detector = small(Recorder, augment=False, batch_size=len(X), **settings)
        detector.samples = []
        detector.fit(X, y)
        return detector, *map(torch.cat, zip(*detector.samples, strict=True))

    return train


def test_pictures_become_anomalies(record, tmp_path):
    X = striped(12)
    pictures = np.full((3, 20, 26), 200, np.uint8)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    for anomalies in (pictures, pictures / 255, tmp_path, str(tmp_path)):
        _, images, anomalous, masks = record(X, anomalies=anomalies)
        assert anomalous.any()
        assert not anomalous.all()
        torch.testing.assert_close(
            images[anomalous], torch.full_like(images[anomalous], 200 / 255)
        )
        assert images[~anomalous].std() > 0.1
        assert torch.equal(masks.amin(dim=(1, 2)), anomalous.float())


@pytest.mark.parametrize(
    ("anomalies", "message"),
    [
        ("nowhere", "holds no image file"),
        (np.zeros((4, 4)), r"anomalies has shape \(4, 4\)"),
        (np.full((1, 4, 4), 2.0), "values from 2 to 2"),
    ],
)
def test_wrong_pictures_are_refused_before_the_network_is_made(
    anomalies, message, small, monkeypatch
):
    monkeypatch.delattr(FCDD, "_build_network")
    with pytest.raises(ValueError, match=message):
        small(FCDD, anomalies=anomalies).fit(striped(4))


def labelled(n=16, n_anomalous=4, mask_size=32):
    """Make images, of which the first have a bright square, and their masks."""
    X = striped(n)
    X[:n_anomalous, 8:16, 16:24] = 1
    masks = np.zeros((n, 32, 32), bool)
    masks[:n_anomalous, 8:16, 16:24] = True
    step = 32 / mask_size
    places = (np.arange(mask_size) * step).astype(int)
    return X, masks[:, places][:, :, places]


@pytest.mark.parametrize("mask_size", [32, 16, 64])
def test_labelled_anomalies_are_learned_with_their_masks(mask_size, record):
    X, y = labelled(mask_size=mask_size)
    detector, images, anomalous, masks = record(X, y)
    assert len(images) == 12
    assert anomalous.any()
    assert (images[anomalous][:, :, 8:16, 16:24] == 1).all()
    expected = torch.zeros(32, 32)
    expected[8:16, 16:24] = 1
    assert (masks[anomalous] == expected).all()
    assert not masks[~anomalous].any()
    maps = detector._upsample(
        detector._cells(detector.network_, images), images.shape[-2:]
    )
    assert maps.shape == masks.shape
    # normal images set the thresholds and the constants
    expected = np.percentile(detector.score_samples(X[4:]), 1)
    assert detector.offset_ == pytest.approx(expected)
    assert torch.equal(
        torch.from_numpy(detector.channel_range_), torch.from_numpy(_range_of(X[4:]))
    )


def _range_of(X):
    images = fcdd.normalize_contrast(torch.from_numpy(X).permute(0, 3, 1, 2))
    lows, highs = images.amin(dim=(0, 2, 3)), images.amax(dim=(0, 2, 3))
    return torch.stack([lows, highs]).numpy()


def test_labels_without_masks_are_learned_image_by_image(small, record):
    X, masks = labelled()
    y = np.where(masks.any(axis=(1, 2)), -1, 1)
    _, images, anomalous, marked = record(X, y)
    assert (images[anomalous][:, :, 8:16, 16:24] == 1).all()
    assert torch.equal(marked.amin(dim=(1, 2)), anomalous.float())
    by_label = small(FCDD).fit(X, y).loss_curve_
    assert small(FCDD, loss="image").fit(X, masks).loss_curve_ == by_label
    assert small(FCDD).fit(X, masks).loss_curve_ != by_label
    # nothing anomalous in y is nothing new
    normal = X[4:]
    expected = small(FCDD).fit(normal).loss_curve_
    for y in (np.ones(12), masks[4:], torch.zeros(12, 32, 32), masks[4:][..., None]):
        assert small(FCDD).fit(normal, y).loss_curve_ == expected


def test_labelled_anomalies_and_pictures_take_turns(record):
    X, y = labelled(64)
    pictures = np.full((1, 8, 8), 0.5)
    _, _, anomalous, masks = record(X, y, anomalies=pictures)
    is_picture = masks.flatten(1).all(dim=1)
    assert 5 < is_picture.sum() < anomalous.sum() - 5


def test_a_small_defect_is_not_lost_where_masks_become_smaller():
    masks = np.zeros((1, 64, 64), bool)
    masks[0, 33, 7] = True
    found = fcdd._masks_in_size(masks, (16, 16))
    assert np.argwhere(found).tolist() == [[0, 8, 1]]


def planted(n, seed):
    X, masks = striped(n, seed=seed), np.zeros((n, 32, 32), bool)
    rng = np.random.default_rng(seed)
    for index, (row, column) in enumerate(rng.integers(2, 20, (n // 2, 2))):
        masks[index, row : row + 10, column : column + 10] = True
    X[masks] = X.transpose(0, 2, 1, 3)[masks]  # stripes that run the other way
    return X, masks


@pytest.mark.parametrize("loss", ["image", "pixel"])
def test_a_planted_defect_is_found(loss, small):
    X, masks = planted(16, seed=1)
    settings = {"max_epochs": 40, "learning_rate": 3e-3, "loss": loss}
    detector = small(FCDD, **settings).fit(striped(32))
    assert detector.loss_curve_[-1] < 0.8 * detector.loss_curve_[0]
    assert roc_auc_score(masks.ravel(), detector.localize(X).ravel()) > 0.85
    anomalous = masks.any(axis=(1, 2))
    assert roc_auc_score(anomalous, -detector.score_samples(X)) > 0.9


# Elsewhere


def test_onnx(fitted, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    X = np.rint(255 * striped(2, seed=1)).astype(np.uint8)
    export(fitted, tmp_path / "fcdd.onnx", batch_size=2)
    session = ort.InferenceSession(
        tmp_path / "fcdd.onnx", providers=["CPUExecutionProvider"]
    )
    maps, scores = session.run(["maps", "scores"], {"images": X})
    np.testing.assert_allclose(maps, fitted.localize(X), atol=1e-4)
    np.testing.assert_allclose(scores, fitted.score_samples(X), atol=1e-4)


def test_a_defect_that_is_cropped_away_is_none(small):
    detector = small(FCDD, anomaly_probability=0.99)
    masks = torch.zeros(64, 32, 32)
    masks[:, 0] = 1  # a row that most crops lose
    images = torch.rand(64, 3, 32, 32)
    pool = fcdd.Pool(images, masks)
    _, anomalous, masks = detector._disturb(images, [pool], seeded())
    assert torch.equal(anomalous, masks.flatten(1).any(dim=1))
    assert 0 < anomalous.sum() < 60


@pytest.mark.parametrize("n", [2, 3, 8])
def test_images_held_out_are_of_both_kinds(small, n):
    detector = small(FCDD, anomaly_probability=0.5)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(n, 3, 32, 32)
        _, anomalous, _ = detector._disturb(images, [], generator, False)
        assert anomalous.sum() == round(n / 2)


@pytest.mark.parametrize(
    "changed",
    [{"local_contrast": False}, {"optimizer": "sgd"}, {"weight_decay": 0.5}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_warm_start_refuses_what_it_cannot_change(small, changed):
    X = striped(8)
    detector = small(FCDD, warm_start=True).fit(X)
    expected = detector.score_samples(X)
    (name,) = changed
    with pytest.raises(
        ValueError, match=f"goes on as the first one began, with {name}"
    ):
        detector.set_params(**changed).fit(X)
    np.testing.assert_array_equal(detector.score_samples(X), expected)
