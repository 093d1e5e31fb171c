import math

import numpy as np
import pytest
import torch
from method_settings import TRAINED_BRIEFLY
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn

from skanomaly import DRAEM
from skanomaly._tensors.losses import focal_loss
from skanomaly.methods.draem import DRAEMNetwork

FOCAL_LOSS_OF_NO_OPINION = 0.25 * math.log(2)


SMALL = {
    "DRAEM": {
        "reconstructive_width": 4,
        "discriminative_width": 8,
        **TRAINED_BRIEFLY,
    }
}
TINY = {"DRAEM": {"reconstructive_width": 2, "discriminative_width": 4}}


@pytest.fixture(scope="module")
def detector(small, random_images):
    """Return a function that makes a small detector with noise for textures."""
    textures = random_images(4, 16, 16)

    def make(cls=DRAEM, **settings):
        return small(cls, **{"textures": textures, **settings})

    return make


def paper_network(reconstructive_width=128, discriminative_width=64):
    """Return the networks for RGB images of 256 px, without memory for the weights."""
    model = DRAEM(
        reconstructive_width=reconstructive_width,
        discriminative_width=discriminative_width,
    )
    model.image_shape_ = (256, 256, 3)
    with torch.device("meta"):
        return model._build_network()


def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.fixture(scope="module")
def X(random_images):
    return random_images(16, 32, 40, 3)


@pytest.fixture(scope="module")
def fitted(X, detector):
    """Trained until the maps clearly differ between the pixels."""
    return detector(max_epochs=8, learning_rate=1e-2, batch_size=4).fit(X)


# The networks


@pytest.mark.parametrize(
    ("widths", "reconstructive", "discriminative"),
    [
        ((128, 64), 69_048_579, 28_374_146),
        ((64, 32), 17_271_939, 7_099_970),
        ((32, 16), 4_322_883, 1_778_210),
        ((16, 8), 1_083_171, 446_162),
    ],
)
def test_numbers_of_parameters(widths, reconstructive, discriminative):
    network = paper_network(*widths)
    assert count_parameters(network.reconstructive) == reconstructive
    assert count_parameters(network.discriminative) == discriminative
    assert count_parameters(network) == reconstructive + discriminative


def test_the_encoder_and_the_decoder_share_the_parameters_as_in_the_code():
    network = paper_network().reconstructive
    assert count_parameters(network.encoder) == 37_622_400


def test_layers_have_the_shapes_of_the_paper():
    network = paper_network()
    sides = {}

    def record(name, blocks):
        for index, block in enumerate(blocks):
            block.register_forward_hook(
                lambda _, inputs, output, key=(name, index): sides.update(
                    {key: (inputs[0].shape[1], *output.shape[1:])}
                )
            )

    record("repair", network.reconstructive.encoder)
    record("repaired", network.reconstructive.decoder)
    record("judge", network.discriminative.encoder)
    record("judged", network.discriminative.decoder)
    images = torch.empty(1, 3, 256, 256, device="meta")
    repaired, logits = network(images)
    assert repaired.shape == (1, 3, 256, 256)
    assert logits.shape == (1, 2, 256, 256)
    # channels before, channels after, height, width
    expected = {
        "repair": [
            (3, 128, 256, 256),
            (128, 256, 128, 128),
            (256, 512, 64, 64),
            (512, 1024, 32, 32),
            (1024, 1024, 16, 16),
        ],
        "repaired": [
            (1024, 512, 32, 32),
            (512, 256, 64, 64),
            (256, 128, 128, 128),
            (128, 128, 256, 256),
        ],
        "judge": [
            (6, 64, 256, 256),
            (64, 128, 128, 128),
            (128, 256, 64, 64),
            (256, 512, 32, 32),
            (512, 512, 16, 16),
            (512, 512, 8, 8),
        ],
        "judged": [
            (1024, 512, 16, 16),
            (768, 256, 32, 32),
            (384, 128, 64, 64),
            (192, 64, 128, 128),
            (128, 64, 256, 256),
        ],
    }
    assert sides == {
        (name, index): shape
        for name, shapes in expected.items()
        for index, shape in enumerate(shapes)
    }


def test_the_second_network_sees_the_repaired_before_the_given_image():
    torch.manual_seed(0)
    network, images = DRAEMNetwork(3, 2, 2).eval(), torch.rand(2, 3, 32, 32)
    pairs = []
    network.discriminative.register_forward_pre_hook(
        lambda _, inputs: pairs.append(inputs[0])
    )
    repaired, _ = network(images)
    assert torch.equal(pairs[0], torch.cat([repaired, images], dim=1))


def test_both_networks_learn_from_the_focal_loss():
    torch.manual_seed(0)
    network = DRAEMNetwork(1, 4, 4)
    _, logits = network(torch.rand(4, 1, 64, 64))
    focal_loss(logits, (torch.rand(4, 64, 64) > 0.5).long()).backward()
    for name, parameter in network.named_parameters():
        if parameter.ndim == 4:  # the weights of the convolutions
            assert parameter.grad.abs().max() > 0, name


# Synthetic defects


class Recorder(DRAEM):
    """Keep what the networks are trained on."""

    def _synthesize(self, images, *draws):
        sample = super()._synthesize(images, *draws)
        self.samples.append((images, *sample))
        return sample


@pytest.fixture
def record_samples(detector, X):
    """Return a function that trains for an epoch and tells on what.

    It returns given, rotated and corrupted images and masks.
    """

    def record(X, **settings):
        model = detector(Recorder, **settings)
        model.samples = []
        model.fit(X)
        return tuple(map(torch.cat, zip(*model.samples, strict=True)))

    return record


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_the_share_of_corrupted_images(probability, random_images, record_samples):
    X = random_images(64, 32, 32)
    _, _, _, masks = record_samples(X, anomaly_probability=probability, batch_size=64)
    share = masks.flatten(1).any(dim=1).float().mean().item()
    assert share == pytest.approx(probability, abs=0.15 if probability == 0.5 else 0.02)


def test_images_are_corrupted_under_their_masks_only(X, record_samples):
    given, clean, corrupted, masks = record_samples(
        X, anomaly_probability=1.0, opacity=(0.5, 0.5), rotation=0.0
    )
    assert torch.equal(clean, given)
    assert masks.shape == (16, 1, 32, 40)
    assert masks.unique().tolist() == [0.0, 1.0]
    inside = masks.expand_as(clean) == 1
    assert torch.equal(corrupted[~inside], clean[~inside])
    textures = (2 * corrupted - clean)[inside]
    assert textures.min() > -1e-5
    assert textures.max() < 1 + 1e-5
    assert (corrupted[inside] != clean[inside]).float().mean() > 0.95


@pytest.mark.filterwarnings("ignore:.*are copies of others")
def test_opacity_weighs_the_texture(record_samples):
    """On black images a flat white texture leaves its opacity, if not inverted."""

    def patches(*opacity):
        _, _, corrupted, masks = record_samples(
            np.zeros((32, 32, 32)),
            textures=np.full((1, 32, 32), 0.5),
            anomaly_probability=1.0,
            opacity=opacity,
        )
        return corrupted[masks == 1]

    opaque, faint = patches(1.0, 1.0), patches(0.1, 0.1)
    torch.testing.assert_close(faint, 0.1 * opaque)
    assert opaque.max() > 0.45
    assert not patches(0.0, 0.0).any()


def test_three_in_ten_images_are_rotated(random_images, record_samples):
    X = random_images(64, 32, 32)
    given, turned, corrupted, masks = record_samples(
        X, anomaly_probability=0.0, batch_size=64
    )
    assert torch.equal(turned, corrupted)
    assert not masks.any()
    changed = (given != turned).flatten(1).any(dim=1)
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.12)
    assert not turned[changed][:, 0, 0, 0].all()  # zeros come in at the corners


class Oracle(nn.Module):
    """Return the images it knows, whatever it is given, and no opinion on masks."""

    def __init__(self, images):
        super().__init__()
        self.images = nn.Parameter(images)

    def forward(self, images):
        repaired = self.images if len(self.images) else images + self.images.sum()
        repaired = repaired.expand_as(images)
        return repaired, repaired.new_zeros(len(images), 2, *images.shape[-2:])


class OracleDRAEM(DRAEM):
    def _build_network(self):
        return Oracle(self.known)


@pytest.fixture
def first_loss(detector, X):
    """Return a function that computes the loss of an oracle."""

    def loss(X, known, **settings):
        model = detector(OracleDRAEM, batch_size=len(X), **settings)
        model.known = torch.from_numpy(known)
        return model.fit(X).loss_curve_[0]

    return loss


@pytest.mark.filterwarnings("ignore:.*are copies of others")
def test_the_target_is_the_image_without_the_defect(first_loss, random_images):
    image = random_images(1, 32, 32)
    X, known = np.repeat(image, 8, axis=0), image[:, None]
    corrupted = {"anomaly_probability": 1.0, "opacity": (1.0, 1.0), "rotation": 0.0}
    assert first_loss(X, known, **corrupted) == pytest.approx(
        FOCAL_LOSS_OF_NO_OPINION, abs=1e-5
    )
    # to return what was given is no repair
    nothing = np.empty((0, 1, 32, 32), np.float32)
    assert first_loss(X, nothing, **corrupted) > FOCAL_LOSS_OF_NO_OPINION + 0.01


def test_the_target_of_a_rotated_image_is_the_rotated_image(first_loss, random_images):
    X, nothing = random_images(16, 32, 32), np.empty((0, 1, 32, 32), np.float32)
    loss = first_loss(X, nothing, anomaly_probability=0.0)
    assert loss == pytest.approx(FOCAL_LOSS_OF_NO_OPINION, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*are copies of others")
@pytest.mark.parametrize(("level", "data_range"), [(0.5, 1.0), (-0.6, 2.0)])
def test_the_range_of_ssim_follows_the_repaired_image(level, data_range, first_loss):
    """For constant images only the constant of the luminance holds the range."""
    X = np.full((2, 64, 64), 0.01, np.float32)
    known = np.full((1, 1, 64, 64), level, np.float32)
    loss = first_loss(X, known, anomaly_probability=0.0, rotation=0.0)
    inside = loss - (level - 0.01) ** 2 - FOCAL_LOSS_OF_NO_OPINION
    weights = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights = np.array(
        [weights[max(0, 5 - i) : 5 + 64 - i].sum() for i in range(64)] / weights.sum()
    )
    share = np.outer(weights, weights)  # of each window that lies in the image
    x, y = level * share, 0.01 * share
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    spread = share - share**2
    ssim = (2 * x * y + c1) / (x**2 + y**2 + c1)
    ssim *= 2 * level * 0.01 * spread + c2
    ssim /= (level**2 + 0.01**2) * spread + c2
    assert inside == pytest.approx(1 - ssim.mean(), abs=1e-4)


# Training


def test_the_learning_rate_falls_to_a_fifth_twice():
    model = DRAEM(max_epochs=20)
    optimizer = model._optimizer(nn.Linear(1, 1))
    assert isinstance(optimizer, torch.optim.Adam)
    scheduler, rates = model._scheduler(optimizer), []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(16 * [1e-4] + 2 * [2e-5] + 2 * [4e-6])


def test_an_interrupted_fit_leaves_a_usable_estimator(X, detector):
    class Interrupted(DRAEM):
        def _losses(self, network, batch, textures):
            if batch.step == 2:  # the first of the second epoch
                raise KeyboardInterrupt
            yield from super()._losses(network, batch, textures)

    model = detector(Interrupted, max_epochs=50)
    with pytest.warns(UserWarning, match="interrupted after 1 epochs"):
        model.fit(X)
    assert model.n_iter_ == len(model.loss_curve_) == 1
    expected = detector(max_epochs=1).fit(X)
    np.testing.assert_array_equal(model.localize(X), expected.localize(X))
    np.testing.assert_array_equal(model.predict(X), expected.predict(X))


def test_a_planted_defect_is_found(small):
    generator = np.random.default_rng(0)

    def stripes(n):
        phases = generator.uniform(0, 2 * np.pi, (n, 1, 1))
        waves = np.sin(2 * np.pi * np.arange(32) / 8 + phases)
        noise = generator.normal(0, 0.02, (n, 32, 32))
        return (0.5 + 0.3 * waves + noise).clip(0, 1)

    X_train, X_test = stripes(32), stripes(20)
    masks = np.zeros(X_test.shape, bool)
    for index, (row, column) in enumerate(generator.integers(2, 22, (10, 2))):
        masks[index, row : row + 8, column : column + 8] = True
    X_test[masks] = X_test.transpose(0, 2, 1)[masks]  # stripes that run the other way

    model = small(
        DRAEM, reconstructive_width=8, rotation=0.0, max_epochs=24, learning_rate=3e-3
    ).fit(X_train)
    assert model.loss_curve_[-1] < 0.8 * model.loss_curve_[0]
    assert roc_auc_score(masks.ravel(), model.localize(X_test).ravel()) > 0.9
    assert roc_auc_score(~masks.any(axis=(1, 2)), model.score_samples(X_test)) > 0.8


# Maps and scores


def test_maps_are_probabilities_that_bound_the_scores(X, fitted):
    maps = fitted.localize(X)
    assert maps.shape == (16, 32, 40)
    assert maps.min() >= 0
    assert maps.max() <= 1
    assert np.ptp(maps) > 0.05
    assert (-fitted.score_samples(X) <= maps.max(axis=(1, 2)) + 1e-6).all()


def test_maps_are_the_softmax_of_the_second_logit(X, fitted):
    images = torch.from_numpy(X).permute(0, 3, 1, 2)
    with torch.no_grad():
        _, logits = fitted.network_(images)
    expected = torch.sigmoid(logits[:, 1] - logits[:, 0])
    np.testing.assert_allclose(fitted.localize(X), expected, atol=1e-5)


def test_scoring_leaves_the_network_as_it_is(X, fitted):
    before = {name: t.clone() for name, t in fitted.network_.state_dict().items()}
    fitted.score_samples(X[:5])
    for name, tensor in fitted.network_.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("size", "pooling_size", "expected"),
    [
        ((256, 256), 21, 21),
        ((256, 512), 21, 21),
        ((128, 256), 21, 11),
        ((64, 64), 21, 5),
        ((32, 32), 21, 3),
        ((1, 2), 21, 3),
        ((256, 256), 7, 7),
        ((256, 256), 1, 1),
        ((512, 512), 21, 41),
    ],
)
def test_the_mean_filter_scales_with_the_image(size, pooling_size, expected):
    """A single pixel of 1 in a map scores one over the area of the filter."""
    logits = torch.zeros(2, 2, *size)
    logits[:, 1] = -1000.0
    logits[0, 1, size[0] // 2, size[1] // 2] = 1000.0
    model = DRAEM(pooling_size=pooling_size)
    model.network_ = lambda images: (images, logits)
    degrees, maps = model._judge(None, maps_wanted=True, generator=None)
    assert maps.sum(dim=(1, 2)).tolist() == [1.0, 0.0]
    assert degrees.tolist() == pytest.approx([1 / expected**2, 0.0])


@pytest.mark.parametrize("shape", [(33, 47, 1), (1, 2, 1), (7, 64, 2), (5, 3, 4)])
def test_images_of_any_size_and_number_of_channels(shape, detector, random_images):
    X = random_images(6, *shape)
    for textures in (None, random_images(3, 16, 16)):
        model = detector(textures=textures, anomaly_probability=1.0).fit(X)
        maps = model.localize(X)
        assert maps.shape == (6, *shape[:2])
        assert 0 <= maps.min() <= maps.max() <= 1
        assert np.isfinite(model.score_samples(X)).all()


def test_one_image_scores_as_in_a_batch(X, fitted):
    scores = fitted.score_samples(X)
    for index in (0, 7):
        single = fitted.score_samples(X[index : index + 1])
        assert single == pytest.approx(scores[index : index + 1], abs=1e-5)


# Sources of textures


@pytest.fixture
def scores_with(detector, X):
    """Return a function that scores images after a training with textures."""

    def scores(textures, X):
        model = detector(textures=textures, anomaly_probability=1.0)
        return model.fit(X[:4]).score_samples(X[:4])

    return scores


def test_textures_of_bytes_equal_those_of_numbers(X, scores_with):
    textures = np.random.default_rng(0).integers(0, 256, (4, 32, 40, 3), np.uint8)
    expected = scores_with(textures, X)
    np.testing.assert_array_equal(scores_with(textures / 255, X), expected)
    assert not np.array_equal(scores_with(255 - textures, X), expected)


def test_grey_textures_are_repeated_for_colour_images(X, random_images, scores_with):
    grey = random_images(4, 16, 16)
    expected = scores_with(np.repeat(grey[..., None], 3, axis=3), X)
    np.testing.assert_array_equal(scores_with(grey, X), expected)
    np.testing.assert_array_equal(scores_with(grey[..., None], X), expected)


def test_colour_textures_are_averaged_for_grey_images(X, scores_with):
    colours = np.random.default_rng(0).integers(0, 85, (4, 32, 40, 1), np.uint8)
    colours = colours * np.array([1, 2, 3], np.uint8)
    expected = scores_with(colours[..., 1], X[..., 0])
    np.testing.assert_array_equal(scores_with(colours, X[..., 0]), expected)


def test_textures_are_resized_to_the_images(X, scores_with):
    flat = np.full((1, 100, 7, 3), 128, np.uint8)
    expected = scores_with(np.full((1, 32, 40, 3), 128, np.uint8), X)
    np.testing.assert_array_equal(scores_with(flat, X), expected)


def save_textures(folder):
    textures = np.random.default_rng(0).integers(0, 256, (3, 32, 40, 3), np.uint8)
    names = ["a/banded_01.png", "a/b/dotted.PNG", "woven.bmp"]
    for name, texture in zip(sorted(names), textures, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(texture).save(folder / name)
    (folder / "a" / "labels.txt").write_text("no image")
    return textures


def test_a_folder_is_searched_with_its_subfolders(tmp_path, X, scores_with):
    expected = scores_with(save_textures(tmp_path), X)
    np.testing.assert_array_equal(scores_with(tmp_path, X), expected)
    np.testing.assert_array_equal(scores_with(str(tmp_path), X), expected)


def test_a_folder_serves_grey_images_too(tmp_path, X, scores_with):
    textures = save_textures(tmp_path)
    expected = scores_with(textures, X[..., :1])
    np.testing.assert_array_equal(scores_with(tmp_path, X[..., :1]), expected)


def test_procedural_textures_need_no_source(X, random_images, scores_with):
    assert not np.array_equal(
        scores_with(None, X), scores_with(random_images(4, 16, 16), X)
    )


@pytest.mark.parametrize("folder", ["", "missing", "labels.txt"])
def test_a_path_without_images_is_refused(folder, tmp_path, X, detector):
    (tmp_path / "labels.txt").write_text("no image")
    model = detector(textures=tmp_path / folder)
    with pytest.raises(ValueError, match=r"textures=.*holds no image file"):
        model.fit(X)
    assert not hasattr(model, "network_")


@pytest.mark.parametrize("shape", [(4,), (4, 8), (0, 8, 8, 3), (2, 2, 8, 8, 3)])
def test_textures_that_are_no_images_are_refused(shape, X, detector):
    model = detector(textures=np.zeros(shape))
    with pytest.raises(ValueError, match=r"textures has shape \(\d.*must hold images"):
        model.fit(X)
    assert not hasattr(model, "network_")


@pytest.mark.parametrize(
    "opacity", [(0.5, 0.4), (-0.1, 1.0), (0.0, 1.1), (0.5,), (0.1, 0.2, 0.3), ()]
)
def test_opacity_must_be_a_range_of_weights(opacity, X, detector):
    model = detector(opacity=opacity)
    with pytest.raises(ValueError, match=r"opacity=.*range \(low, high\)"):
        model.fit(X)
    assert not hasattr(model, "network_")
