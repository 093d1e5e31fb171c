import math
from functools import partial

import numpy as np
import pytest
import torch
from method_settings import TRAINED_BRIEFLY
from sklearn.metrics import roc_auc_score

from skanomaly import MemAE
from skanomaly.methods.memae import Memory

SMALL = {"MemAE": {"n_items": 8, "channels": (4, 8, 8), **TRAINED_BRIEFLY}}


@pytest.fixture(scope="module")
def detector(small):
    """Return a function that makes a small detector of two layers."""
    return partial(small, MemAE, n_items=6, channels=(4, 8), learning_rate=1e-2)


def stripes(n, size=32, seed=0, noise=0.02):
    rng = np.random.default_rng(seed)
    wave = 0.5 + 0.3 * np.sin(np.arange(size) * np.pi / 4)
    return (wave[:, None] + rng.normal(0, noise, (n, size, size))).clip(0, 1)


def memory(n_items=20, n_features=4, shrink=0.05, similarity="dot"):
    torch.manual_seed(0)
    return Memory(n_items, n_features, shrink, similarity)


def build(shape, **settings):
    model = MemAE(**settings)
    model.image_shape_ = shape
    with torch.device("meta"):
        return model._build_network()


@pytest.mark.parametrize(
    ("shape", "clip_length", "expected"),
    [
        ((256, 256, 1), 16, 6_492_801),
        ((256, 256, 3), 16, 6_503_171),
        ((32, 32, 3), None, 1_166_339),
    ],
)
def test_paper_size(shape, clip_length, expected):
    network = build(shape, clip_length=clip_length)
    assert sum(p.numel() for p in network.parameters()) == expected


def slow_weights(queries, items, shrink):
    """The sheet's steps, query by query and item by item."""
    rows = []
    for query in queries:
        similarity = [float(query @ item) for item in items]
        total = sum(math.exp(value) for value in similarity)
        weights = [math.exp(value) / total for value in similarity]
        kept = [w if w > shrink else 0.0 for w in weights]
        if not any(kept):
            kept = [w if w == max(weights) else 0.0 for w in weights]
        rows.append([w / sum(kept) for w in kept])
    return torch.tensor(rows)


@pytest.mark.parametrize("shrink", [0.0, 0.05, 0.2, 0.9])
def test_weights_equal_a_slow_reference(shrink):
    bank = memory(shrink=shrink)
    queries = 3 * torch.randn(30, 4)
    read, weights = bank(queries)
    expected = slow_weights(queries, bank.items.detach(), shrink)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(read, expected @ bank.items, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(30))
    if shrink:
        # all weights above the threshold, or the largest alone
        n_kept = (weights > 0).sum(dim=1)
        assert ((n_kept < 1 / shrink) | (n_kept == 1)).all()
    else:
        assert (weights > 0).all()
    assert (read <= bank.items.amax(dim=0) + 1e-6).all()
    assert (read >= bank.items.amin(dim=0) - 1e-6).all()


def test_no_query_is_lost_to_the_threshold():
    bank = memory(n_items=50, shrink=0.5)
    queries = torch.cat([torch.zeros(1, 4), torch.randn(20, 4)]).requires_grad_()
    read, weights = bank(queries)
    assert (weights.amax(dim=1) > 0).all()
    read.square().sum().backward()
    assert bank.items.grad.abs().sum() > 0


def test_cosine_weights_ignore_the_length_of_queries():
    bank = memory(similarity="cosine")
    queries = torch.randn(5, 4)
    torch.testing.assert_close(bank(queries)[1], bank(7 * queries)[1])
    assert not torch.allclose(memory()(queries)[1], memory()(7 * queries)[1])


def test_one_item_leaves_nothing_of_the_image(detector):
    model = detector(n_items=1).fit(stripes(8))
    network = model.network_
    with torch.inference_mode():
        rebuilt, _ = network(torch.randn(3, 1, 32, 32))
    torch.testing.assert_close(rebuilt[0], rebuilt[1])


def test_the_order_of_items_does_not_matter(detector):
    model = detector().fit(stripes(8))
    X = stripes(3, seed=1)
    expected = model.score_samples(X)
    with torch.no_grad():
        model.network_.memory.items.copy_(model.network_.memory.items.flip(0))
    np.testing.assert_allclose(model.score_samples(X), expected, rtol=1e-5)


@pytest.mark.parametrize("shrink", [0.0, 1 / 6])
def test_loss_is_error_and_entropy_of_what_is_read(shrink, detector, make_batch):
    model = detector(entropy_weight=0.3, shrink=shrink)
    model.image_shape_ = (32, 32, 1)
    network = model._build_network()
    images = torch.rand(4, 1, 32, 32)
    network.eval()
    ((part, loss),) = model._losses(network, make_batch(images))
    rebuilt, weights = network(2 * images - 1)
    assert (weights == 0).any() == (shrink > 0)
    entropy = -torch.special.xlogy(weights, weights).sum(dim=1).mean()
    expected = ((rebuilt - (2 * images - 1)) ** 2).mean() + 0.3 * entropy
    assert part is network
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert 0 < entropy <= math.log(6) + 1e-6


@pytest.mark.parametrize(("shrink", "expected"), [(0.9, 0.0), (0.0, math.log(6))])
def test_entropy_of_one_item_is_0_and_of_all_alike_the_logarithm(
    shrink, expected, detector, make_batch
):
    plain, weighted = detector(entropy_weight=0.0), detector(entropy_weight=1.0)
    plain.image_shape_ = (32, 32, 1)
    plain.shrink = shrink  # a large one leaves each query its nearest item alone
    network = plain._build_network().eval()
    if not shrink:
        with torch.no_grad():
            network.memory.items.copy_(network.memory.items[:1].repeat(6, 1))
    batch = make_batch(torch.rand(1, 1, 32, 32))
    losses = [next(m._losses(network, batch))[1].item() for m in (plain, weighted)]
    assert losses[1] - losses[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("channels", [(), (4, 0), (4, 8.0)])
def test_impossible_channels_are_refused(channels, detector):
    with pytest.raises(ValueError, match="channels="):
        detector(channels=channels).fit(stripes(4))


def test_items_are_learned_and_then_left_alone(detector):
    X = stripes(8)
    first, second = detector(max_epochs=1).fit(X), detector(max_epochs=2).fit(X)
    assert not torch.equal(first.network_.memory.items, second.network_.memory.items)
    before = first.network_.memory.items.clone()
    first.localize(X)
    assert torch.equal(first.network_.memory.items, before)
    assert first.item_usage_.shape == (6,)
    assert first.item_usage_.sum() == pytest.approx(1.0, abs=1e-5)


def test_maps_are_distances_of_colours_and_scores_their_mean(detector, random_images):
    X = random_images(6, 20, 27, 3)
    model = detector().fit(X)
    images = 2 * torch.from_numpy(X).permute(0, 3, 1, 2) - 1
    with torch.inference_mode():
        rebuilt, _ = model.network_(images)
    expected = ((rebuilt - images) ** 2).sum(dim=1).sqrt()
    np.testing.assert_allclose(model.localize(X), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        model.score_samples(X), -expected.mean(dim=(1, 2)), rtol=1e-5
    )


@pytest.fixture(scope="module")
def clips(random_images):
    return random_images(10, 6, 20, 24, 1)


@pytest.fixture(scope="module")
def fitted_on_clips(clips, detector):
    return detector(clip_length=6).fit(clips)


def test_clips_have_maps_of_every_frame(fitted_on_clips, clips):
    maps = fitted_on_clips.localize(clips[:2])
    assert maps.shape == (2, 6, 20, 24)
    anomalous = fitted_on_clips.predict(clips[:2]) == -1
    np.testing.assert_array_equal(
        fitted_on_clips.segment(clips[:2]),
        (maps > fitted_on_clips.map_threshold_) & anomalous[:, None, None, None],
    )
    np.testing.assert_allclose(
        fitted_on_clips.score_samples(clips[:2]), -maps.mean(axis=(1, 2, 3)), rtol=1e-5
    )
    np.testing.assert_array_equal(fitted_on_clips.localize(clips[:2, ..., 0]), maps)


def test_clips_may_be_rows(fitted_on_clips, clips, detector):
    by_row = detector(clip_length=6, image_shape=(20, 24)).fit(clips.reshape(10, -1))
    assert by_row.n_features_in_ == 6 * 20 * 24
    assert by_row.image_shape_ == (20, 24, 1)
    np.testing.assert_array_equal(
        by_row.score_samples(clips.reshape(10, -1)),
        fitted_on_clips.score_samples(clips),
    )


def test_masks_of_clips_are_labels(clips, detector):
    masks = np.zeros(clips.shape[:4], bool)
    masks[0, 3, 4:8, 4:8] = True
    expected = detector(clip_length=6).fit(clips[1:])
    found = detector(clip_length=6).fit(clips, masks)
    np.testing.assert_array_equal(
        found.score_samples(clips), expected.score_samples(clips)
    )


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros((4, 5, 8, 8, 1)), "wants clips of T = 6"),
        (np.zeros((4, 8, 8)), "wants clips of T = 6"),
        (np.zeros((4, 20)), "cannot share out to the 6 images"),
    ],
)
def test_other_clips_are_refused(X, message, detector):
    with pytest.raises(ValueError, match=message):
        detector(clip_length=6).fit(X)


def test_a_planted_defect_is_found(detector):
    X, X_test = stripes(64), stripes(20, seed=1)
    mask = np.zeros(X_test.shape, bool)
    mask[10:, 8:18, 8:18] = True
    X_test[mask] = 1 - X_test[mask]
    model = detector(n_items=20, channels=(8, 16, 16), max_epochs=25).fit(X)
    assert roc_auc_score(mask[:, 8, 8], -model.score_samples(X_test)) > 0.95
    assert roc_auc_score(mask[10:].ravel(), model.localize(X_test[10:]).ravel()) > 0.8
