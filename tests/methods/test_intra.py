import numpy as np
import pytest
import torch
from method_settings import TRAINED_BRIEFLY
from sklearn.metrics import roc_auc_score
from torch import nn

from skanomaly import InTra
from skanomaly._tensors.filters import mean_filter, scaled_size
from skanomaly._tensors.losses import msgms_loss, msgms_map, ssim_loss
from skanomaly._tensors.masking import windows
from skanomaly.methods.intra import InpaintingTransformer

SMALL = {
    "InTra": {
        "patch_size": 4,
        "window_size": 3,
        "width": 16,
        "n_heads": 2,
        "n_blocks": 2,
        "windows_per_image": 4,
        **TRAINED_BRIEFLY,
    }
}
TINY = {"InTra": {"patch_size": 1, "window_size": 1}}


@pytest.fixture
def build(small):
    """Return a function that makes a detector with an untrained network."""

    def make(shape=(24, 24, 3), **settings):
        model = small(InTra, **settings)
        model.image_shape_ = shape
        torch.manual_seed(0)
        model.network_ = model._build_network().eval()
        return model

    return make


@pytest.fixture(scope="module")
def fitted(random_images, small):
    return small(InTra).fit(random_images(8, 24, 24, 3))


@pytest.mark.parametrize(
    ("size", "positions", "expected"),
    [
        (256, "local", 55_446_784),
        (256, "global", 55_552_768),
        (320, "global", 55_626_496),
    ],
)
def test_paper_size(size, positions, expected):
    model = InTra(positions=positions)
    model.image_shape_ = (size, size, 3)
    with torch.device("meta"):
        network = model._build_network()
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


class Oracle(nn.Module):
    """Returns the patch that was to be painted, found by its place."""

    def __init__(self, patches):
        super().__init__()
        self.patches = patches
        self.n_windows = 0
        self.embed = nn.Identity()
        self.on_device = nn.Parameter(torch.zeros(()))

    def forward(self, embedded, cells, hidden):
        self.n_windows += len(hidden)
        return embedded[torch.arange(len(hidden)), hidden]


@pytest.mark.parametrize("size", [(24, 24), (26, 26), (24, 34)])
def test_each_patch_is_painted_once_and_put_into_its_place(size, build):
    model = build((*size, 3))
    images = torch.rand(2, 3, *size)
    model.network_ = Oracle(None)
    assert torch.equal(model._paint_all(images), images)
    assert model.network_.n_windows == 2 * -(-size[0] // 4) * -(-size[1] // 4)


def test_a_perfect_painter_leaves_nothing(random_images, small):
    model = small(InTra, reference="none").fit(random_images(4, 24, 24, 3))
    model.network_ = Oracle(None)
    np.testing.assert_allclose(
        model.localize(random_images(4, 24, 24, 3)), 0, atol=1e-5
    )


def test_windows_at_once_do_not_change_maps_and_patches_are_embedded_once(
    monkeypatch, random_images, small
):
    X = random_images(3, 24, 24, 3, seed=1)
    model = small(InTra, reference="none").fit(random_images(4, 24, 24, 3))
    expected, calls = model.localize(X), []
    monkeypatch.setattr("skanomaly.methods.intra.WINDOWS_AT_ONCE", 7)
    model.network_.embed.register_forward_hook(lambda *_: calls.append(1))
    np.testing.assert_allclose(model.localize(X), expected, rtol=1e-4, atol=1e-6)
    assert len(calls) == 1


def test_a_patch_is_painted_without_being_seen(build):
    model = build()
    images = torch.rand(1, 3, 24, 24)
    other = images.clone()
    other[..., 8:12, 4:8] = 1 - other[..., 8:12, 4:8]
    with torch.no_grad():
        first, second = model._paint_all(images), model._paint_all(other)
    difference = (first - second).abs().amax(dim=(0, 1))
    assert (difference[8:12, 4:8] == 0).all()
    assert difference.max() > 1e-6


def test_textures_may_be_shifted_by_whole_patches(build):
    images = torch.rand(1, 3, 32, 32)
    shifted = images.roll((4, 4), dims=(2, 3))
    inner = (..., slice(12, 24), slice(12, 24))
    for positions in ("local", "global"):
        model = build((32, 32, 3), positions=positions)
        with torch.no_grad():
            model.network_.positions.normal_()
            painted = model._paint_all(images).roll((4, 4), dims=(2, 3))[inner]
            found = model._paint_all(shifted)[inner]
        assert torch.allclose(painted, found, atol=1e-5) == (positions == "local")


def test_the_order_of_patches_and_positions_does_not_matter():
    torch.manual_seed(0)
    network = InpaintingTransformer(12, 9, 16, 2, 3).eval()
    embedded, positions = torch.randn(2, 9, 16), torch.arange(9)[None].expand(2, 9)
    order = torch.randperm(9)
    hidden = torch.tensor([2, 7])
    moved = order.argsort()[hidden]
    torch.testing.assert_close(
        network(embedded[:, order], positions[:, order], moved),
        network(embedded, positions, hidden),
    )


@pytest.mark.parametrize(
    ("n_blocks", "pairs"), [(2, {}), (4, {3: 0}), (5, {4: 0, 3: 1})]
)
def test_early_blocks_feed_their_mirror_images(n_blocks, pairs):
    network = InpaintingTransformer(12, 9, 16, 2, n_blocks).eval()
    inputs, outputs = {}, {}

    def record(block, arguments, output):
        inputs[len(inputs)], outputs[len(outputs)] = arguments[0], output

    for block in network.blocks:
        block.register_forward_hook(record)
    network(torch.randn(2, 9, 16), torch.arange(9)[None], torch.tensor([0, 3]))
    for i in range(1, n_blocks):
        expected = outputs[i - 1]
        if i in pairs:
            expected = expected + outputs[pairs[i]]
        assert torch.equal(inputs[i], expected)


def test_loss(build, make_batch):
    model = build(patch_size=8, gms_weight=0.5, ssim_weight=0.25)
    images = torch.rand(2, 3, 24, 24)
    ((part, loss),) = model._losses(model.network_, make_batch(images, seed=1))
    draws = torch.Generator().manual_seed(1)
    corners = torch.stack(
        [torch.randint(1, (8,), generator=draws) for _ in range(2)], dim=1
    )
    cells = windows(3, 3, 3, corners=corners)
    hidden = torch.randint(9, (8,), generator=draws)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8)  # (b, c, 3, 3, 8, 8)
    rows = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # (b, 9, 192)
    owners = torch.arange(8) % 2
    painted = model.network_(
        model.network_.embed(rows)[owners[:, None], cells], cells, hidden
    )
    targets = rows[owners, cells[torch.arange(8), hidden]]
    painted, targets = painted.view(8, 3, 8, 8), targets.view(8, 3, 8, 8)
    expected = (
        ((painted - targets) ** 2).mean()
        + 0.5 * msgms_loss(painted, targets, n_scales=3)
        + 0.25 * ssim_loss(painted, targets, window_size=7)
    )
    assert part is model.network_
    torch.testing.assert_close(loss, expected)


def test_maps_compare_with_the_mean_map_of_the_training(random_images, small):
    X = random_images(3, 24, 24, 3, seed=1)

    def distances(array):
        images = torch.from_numpy(array).permute(0, 3, 1, 2)
        with torch.inference_mode():
            similarity = msgms_map(fitted._paint_all(images), images, n_scales=3)
        return mean_filter(1 - similarity, scaled_size(60, similarity), padding="none")

    fitted = small(InTra, smoothing_size=60).fit(random_images(8, 24, 24, 3))
    mean = distances(random_images(8, 24, 24, 3)).mean(dim=0)
    np.testing.assert_allclose(fitted.mean_map_, mean, rtol=1e-4)
    excess = (distances(X) - mean).numpy()
    for reference, expected in {
        "squared": excess**2,
        "excess": excess.clip(min=0),
        "none": distances(X).numpy(),
    }.items():
        fitted.set_params(reference=reference)
        np.testing.assert_allclose(fitted.localize(X), expected, rtol=1e-2, atol=1e-6)
        np.testing.assert_allclose(
            -fitted.score_samples(X), expected.max(axis=(1, 2)), rtol=1e-2
        )


@pytest.mark.filterwarnings("ignore:.*are copies of others")
def test_equal_training_images_have_empty_maps(random_images, small):
    X = np.repeat(random_images(1, 24, 24, 3), 4, axis=0)
    np.testing.assert_allclose(small(InTra).fit(X).localize(X), 0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_size": 7}, r"window_size=7 is more than.*\(6, 6\) patches"),
        ({"width": 18}, "multiple of 2 \\* n_heads"),
        ({"positions": "none"}, "positions"),
    ],
)
def test_bad_settings_are_refused(settings, message, random_images, small):
    with pytest.raises(ValueError, match=message):
        small(InTra, **settings).fit(random_images(4, 24, 24, 3))


def test_a_planted_defect_is_found(small):
    rng = np.random.default_rng(0)
    wave = 0.5 + 0.3 * np.sin(np.arange(32) * np.pi / 4)
    X = (wave[:, None] + rng.normal(0, 0.02, (44, 32, 32))).clip(0, 1)
    X, X_test = X[:32], X[32:]
    mask = np.zeros(X_test.shape, bool)
    mask[6:, 8:18, 8:18] = True
    X_test[mask] = 1 - X_test[mask]
    model = small(InTra, width=32, n_blocks=3, max_epochs=25, windows_per_image=8).fit(
        X
    )
    assert roc_auc_score(mask[6:].ravel(), model.localize(X_test[6:]).ravel()) > 0.8
    assert roc_auc_score(mask[:, 8, 8], -model.score_samples(X_test)) > 0.95
