import numpy as np
import pytest
import torch
from method_settings import TRAINED_BRIEFLY
from sklearn.metrics import roc_auc_score

from skanomaly import DeScarGAN
from skanomaly._tensors.losses import gradient_penalty
from skanomaly.methods.descargan import GridMaxPool, _class_weights

SMALL = {"DeScarGAN": {"width": 4, "critic_width": 4, "n_critic": 1, **TRAINED_BRIEFLY}}
TINY = {"DeScarGAN": {"width": 2, "critic_width": 2}}

WITHOUT_LABELS = "calls fit without labels, of which DeScarGAN learns"
EXPECTED_FAILURES = {
    "DeScarGAN": {
        "check_outliers_train": WITHOUT_LABELS,
        "check_outliers_fit_predict": WITHOUT_LABELS,
    }
}


def squares(n, size=32, seed=0):
    """Make noisy images; every second one has a bright square and the label -1."""
    rng = np.random.default_rng(seed)
    X = (0.3 + 0.05 * rng.standard_normal((n, size, size))).clip(0, 1)
    mask = np.zeros(X.shape, bool)
    for i in range(1, n, 2):
        top, left = rng.integers(2, size - 12, 2)
        mask[i, top : top + 10, left : left + 10] = True
    X[mask] += 0.5
    return X.astype(np.float32), np.where(np.arange(n) % 2, -1, 1), mask


@pytest.fixture(scope="module")
def fitted(small):
    X, y, _ = squares(16)
    return small(DeScarGAN).fit(X, y)


@pytest.fixture
def build(small):
    """Return a function that makes a detector with an untrained network."""

    def make(**settings):
        model = small(DeScarGAN, **settings)
        model.image_shape_ = (32, 32, 1)
        torch.manual_seed(0)
        model.network_ = model._build_network()
        return model

    return make


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (3, 5)])
def test_the_pooling_is_adaptive(size, random_images):
    features = torch.from_numpy(random_images(2, 3, *size)).requires_grad_()
    gradients = []
    for pool in (GridMaxPool(4), torch.nn.AdaptiveMaxPool2d(4)):
        maxima = pool(features)
        (gradient,) = torch.autograd.grad(maxima.square().sum(), features)
        gradients.append((maxima, gradient))
    torch.testing.assert_close(*gradients)


def test_paper_size():
    model = DeScarGAN()
    model.image_shape_ = (256, 256, 1)
    with torch.device("meta"):
        network = model._build_network()
    counts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in network.items()
    }
    # the code's generator sees two label channels and normalises before both tanh
    assert counts["generator"] == 8_528_262 - 2 * 9 * 64 - 2 * 2
    assert counts["critic"] == 18_170_180
    with torch.device("meta"):
        features = network["critic"](torch.empty(1, 1, 256, 256))
        assert network["critic"].healthy(features).shape == (1, 1, 8, 8)
        assert network["critic"].classify(features, seeded()).shape == (1, 2)


def test_both_heads_have_the_size_of_the_images_and_share_the_trunk(build):
    generator = build().network_["generator"]
    images = 2 * torch.rand(2, 1, 30, 41) - 1
    healthy, diseased = generator(images)
    assert healthy.shape == diseased.shape == images.shape
    assert healthy.abs().max() <= 1
    assert not torch.equal(healthy, diseased)
    (healthy.sum()).backward()
    assert generator.down[0][0].weight.grad.abs().sum() > 0
    assert generator.diseased[0].weight.grad is None


def test_the_topmost_features_reach_the_heads_through_pooling_only(build):
    generator = build().network_["generator"]
    # if the pooled path is cut behind the first level, the image has no way around
    generator.down[1].register_forward_hook(
        lambda module, inputs, output: torch.zeros_like(output)
    )
    first, second = generator(torch.rand(2, 1, 32, 32))[0]
    assert torch.equal(first, second)


def test_gradient_penalty():
    real, fake = torch.rand(2, 5, 1, 6, 6)

    def penalty(critic):
        return gradient_penalty(critic, real, fake, generator=seeded()).item()

    assert penalty(lambda x: 0 * x) == pytest.approx(1.0, abs=1e-5)
    direction = torch.nn.functional.normalize(torch.rand(36), dim=0)
    slope = direction[:, None]
    assert penalty(lambda x: x.flatten(1) @ slope) == pytest.approx(0.0, abs=1e-10)
    assert penalty(lambda x: 3 * x.flatten(1) @ slope) == pytest.approx(4.0, rel=1e-5)
    # the slope of a square is taken between the images, at a place for each pair
    places = torch.rand(5, 1, 1, 1, generator=seeded())
    between = places * real + (1 - places) * fake
    norms = 2 * between.flatten(1).norm(dim=1) / 36
    expected = (norms - 1).square().mean().item()
    assert penalty(torch.square) == pytest.approx(expected, rel=1e-4)


def test_the_generator_steps_after_every_n_th_step_of_the_critic(build, make_batch):
    model = build(n_critic=3)
    images, labels = torch.rand(4, 1, 32, 32), torch.tensor([1, -1, 1, -1])
    names = {part: name for name, part in model.network_.items()}
    steps = [
        [
            names[part]
            for part, _ in model._losses(
                model.network_, make_batch(images, labels, step=i)
            )
        ]
        for i in range(5)
    ]
    both = ["critic", "generator"]
    assert steps == [both, ["critic"], ["critic"], both, ["critic"]]


def test_the_critic_has_a_learning_rate_of_its_own(small):
    X, y, _ = squares(8)

    def weights(detector):
        return {
            name: torch.cat([w.detach().flatten() for w in part.parameters()])
            for name, part in detector.network_.items()
        }

    def first_step(**settings):
        detector = small(DeScarGAN, max_epochs=1, batch_size=8, **settings)
        return weights(detector.fit(X, y))

    still, slow, fast = (
        first_step(learning_rate=1e-12, critic_learning_rate=rate)
        for rate in (None, 1e-4, 1e-3)
    )
    # Adam's first step is as long as the rate, whatever the gradients; two generators
    # that go opposite ways are two steps apart
    assert (slow["generator"] - still["generator"]).abs().amax() <= 2.1e-12
    steps = [(part["critic"] - still["critic"]).abs() for part in (slow, fast)]
    assert steps[0].max().item() == pytest.approx(1e-4, rel=1e-2)
    assert steps[1].max().item() == pytest.approx(1e-3, rel=1e-2)

    # and may get another one between two fits
    detector = small(DeScarGAN, warm_start=True, critic_learning_rate=1e-3).fit(X, y)
    before = weights(detector)
    detector.set_params(critic_learning_rate=1e-12).fit(X, y)
    after = weights(detector)
    assert (after["critic"] - before["critic"]).abs().amax() < 1e-9
    assert (after["generator"] - before["generator"]).abs().amax() > 1e-4


@pytest.mark.parametrize("labels", [[1, -1, 1, 1], [1, 1, 1, 1], [-1, -1, -1, -1]])
def test_losses_of_any_mixture_are_finite(labels, build, make_batch):
    model = build()
    images = torch.rand(4, 1, 32, 32)
    batch = make_batch(images, torch.tensor(labels))
    losses = [loss for _, loss in model._losses(model.network_, batch)]
    assert len(losses) == 2
    assert torch.isfinite(torch.stack(losses)).all()


def test_a_critic_that_cannot_tell_gains_nothing_by_a_constant(build, make_batch):
    """Real and generated images weigh the same, so that a bias cancels."""
    model = build(penalty_weight=0.0)
    images, labels = torch.rand(4, 1, 32, 32), torch.tensor([1, -1, 1, 1])
    critic = model.network_["critic"].eval()
    found = []
    for bias in (0.0, 10.0):
        for head in (critic.healthy, critic.diseased):
            torch.nn.init.constant_(head[-1].bias, bias)
        steps = model._losses(model.network_, make_batch(images, labels))
        found.append(next(steps)[1].item())
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_classes_count_alike():
    healthy = torch.tensor([True, False, True, True])
    weights = _class_weights(healthy)
    torch.testing.assert_close(weights, torch.tensor([1 / 6, 1 / 2, 1 / 6, 1 / 6]))
    torch.testing.assert_close(_class_weights(healthy[[0, 2]]), torch.full((2,), 0.5))


def test_losses_equal_a_slow_reference(build, make_batch):
    model = build(noise=0.0, flip=False, cycle_weight=3.0, identity_weight=7.0)
    generator, critic = model.network_["generator"], model.network_["critic"].eval()
    images, labels = torch.rand(4, 1, 32, 32), torch.tensor([1, -1, 1, 1])
    losses = dict(model._losses(model.network_, make_batch(images, labels, seed=1)))

    draws = seeded(1)
    torch.rand(images.shape, generator=draws)  # the noise
    images = 2 * images - 1
    rows = {"healthy": [0, 2, 3], "diseased": [1]}
    made = dict(zip(rows, generator(images), strict=True))
    heads = {"healthy": critic.healthy, "diseased": critic.diseased}

    def class_loss(batch, row, target):
        logits = critic.classify(critic(batch), draws)[row]
        return -logits.log_softmax(dim=0)[["healthy", "diseased"].index(target)]

    expected = 0.0
    for own, its_rows in rows.items():
        head = heads[own]
        real = torch.stack([head(critic(images))[row].mean() for row in its_rows])
        fake = head(critic(made[own])).mean()
        penalty = gradient_penalty(
            lambda points, head=head: head(critic(points)),
            images,
            made[own].detach(),
            generator=draws,
        )
        # each class has half of the weight of a batch of both
        expected = expected + 20 * (fake / 2 - real.mean() / 2) + 10 * penalty
        for row in its_rows:
            expected = expected + 5 / 2 * class_loss(images, row, own) / len(its_rows)
    torch.testing.assert_close(losses[critic], expected, rtol=1e-4, atol=1e-4)

    expected = 0.0
    for own, its_rows in rows.items():
        (other,) = set(rows) - {own}
        back = dict(zip(rows, generator(made[other]), strict=True))[own]
        identity, cycle = (
            torch.stack([(v[row] - images[row]).square().mean() for row in its_rows])
            for v in (made[own], back)
        )
        expected = expected + 7 * identity.mean() + 3 * cycle.mean()
        expected = expected - heads[own](critic(made[own])).mean()
        for row in range(4):
            expected = expected + class_loss(made[own], row, own) / 4
    torch.testing.assert_close(losses[generator], expected, rtol=1e-4, atol=1e-4)


def test_the_class_score_costs_no_pass_of_the_generator(fitted):
    passes = []
    hook = fitted.network_["generator"].register_forward_hook(
        lambda *_: passes.append(1)
    )
    fitted.score_samples(squares(4)[0])
    assert not passes
    fitted.localize(squares(4)[0])
    assert passes
    hook.remove()


def test_maps_are_what_must_change_to_look_healthy(fitted):
    X, _, _ = squares(4, seed=1)
    healthy = fitted.transform_to_healthy(X)
    assert healthy.shape == (4, 32, 32, 1)
    assert 0 <= healthy.min() <= healthy.max() <= 1
    np.testing.assert_allclose(
        fitted.localize(X), np.abs(X - healthy[..., 0]), atol=1e-6
    )


def test_scores_are_probabilities_or_means_of_maps(fitted):
    X, _, _ = squares(4, seed=1)
    scores = -fitted.score_samples(X)
    images = 2 * torch.from_numpy(X)[:, None] - 1
    critic = fitted.network_["critic"]
    with torch.inference_mode():
        probabilities = critic.classify(critic(images), None).softmax(dim=1)
    np.testing.assert_allclose(scores, probabilities[:, 1], rtol=1e-4)
    fitted.set_params(image_score="mean")
    np.testing.assert_allclose(
        -fitted.score_samples(X), fitted.localize(X).mean(axis=(1, 2)), rtol=1e-5
    )
    fitted.set_params(image_score="classifier")


def test_thresholds_come_from_the_healthy_images(small):
    X, y, _ = squares(16)
    model = small(DeScarGAN, contamination=0.25, max_epochs=2).fit(X, y)
    healthy = model.score_samples(X[y == 1])
    assert model.offset_ == pytest.approx(np.percentile(healthy, 25))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "requires y to be passed"),
        (np.tile([0, 1], 4), r"holds \[0.*1.*\]\. datasets.labels_from"),
        (np.ones(8), "both healthy"),
        (-np.ones(8), "both healthy"),
        (np.array(["a", "b"] * 4), "holds names"),
        (np.tile([1, -1], 3), "length 6"),
    ],
)
def test_other_labels_are_refused(y, message, small):
    with pytest.raises(ValueError, match=message):
        small(DeScarGAN).fit(squares(8)[0], y)


def test_masks_are_labels(small):
    X, y, mask = squares(8)
    by_label, by_mask = small(DeScarGAN).fit(X, y), small(DeScarGAN).fit(X, mask)
    np.testing.assert_array_equal(by_label.score_samples(X), by_mask.score_samples(X))


def test_fit_predict_hands_labels_on(small):
    X, y, _ = squares(8)
    np.testing.assert_array_equal(
        small(DeScarGAN).fit_predict(X, y), small(DeScarGAN).fit(X, y).predict(X)
    )


def test_a_bright_square_is_found(small):
    X, y, _ = squares(32)
    X_test, y_test, mask = squares(20, seed=1)
    model = small(DeScarGAN, n_critic=2, max_epochs=24, batch_size=8).fit(X, y)
    maps = model.localize(X_test)
    assert roc_auc_score(y_test == -1, -model.score_samples(X_test)) > 0.9
    inside = maps[mask].mean()
    outside = maps[y_test == -1][~mask[y_test == -1]].mean()
    assert inside > 1.5 * outside
    assert maps[y_test == 1].mean() < maps[y_test == -1].mean()
