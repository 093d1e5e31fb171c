import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_settings import ROUNDING, TRAINED_BRIEFLY

from skanomaly import MNAD
from skanomaly.methods.mnad import updated_memory

SMALL = {"MNAD": {"width": 4, **TRAINED_BRIEFLY}}
PLANTED = {"MNAD": (32, 12)}
EXPECTED_FAILURES = {"MNAD": {"check_methods_subset_invariance": ROUNDING}}


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


@pytest.mark.parametrize(
    ("task", "channels", "expected"),
    [
        ("prediction", 3, 15_651_843),
        ("prediction", 1, 15_646_081),
        ("reconstruction", 3, 17_196_291),
        ("reconstruction", 1, 17_193_985),
    ],
)
def test_paper_size(task, channels, expected):
    model = MNAD(task=task)
    model.image_shape_ = (256, 256, channels)
    with torch.device("meta"):
        network = model._build_network()
    # the published count has a batch normalisation of 512 channels that is never called
    never_called = 2 * 512
    count = sum(p.numel() for p in network.parameters())
    assert count == expected - never_called
    assert network.memory.shape == (10, 512)
    assert "memory" not in dict(network.named_parameters())


def slow_update(memory, queries):
    """The paper's update, item by item."""
    similarity = queries @ memory.T
    over_queries = similarity.softmax(dim=0)
    nearest = similarity.argmax(dim=1)
    new = memory.clone()
    for m in range(len(memory)):
        own = (nearest == m).nonzero()[:, 0]
        if not len(own):
            continue
        weights = over_queries[own, m] / over_queries[own, m].max()
        new[m] = F.normalize(
            memory[m] + (weights[:, None] * queries[own]).sum(0), dim=0
        )
    return new, nearest


def test_update_equals_a_slow_reference():
    torch.manual_seed(0)
    memory, queries = unit(10, 6), unit(40, 6)
    queries = torch.cat([queries, queries[:5]])
    expected, _ = slow_update(memory, queries)
    found = updated_memory(memory, queries)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(10))
    few = updated_memory(memory, queries[:3])
    unused = sorted(set(range(10)) - set(slow_update(memory, queries[:3])[1].tolist()))
    assert unused
    torch.testing.assert_close(few[unused], memory[unused])


@pytest.fixture
def network(small):
    model = small(MNAD)
    model.image_shape_ = (24, 24, 1)
    torch.manual_seed(0)
    return model._build_network()


def test_items_and_queries_have_unit_norm(network):
    queries, _ = network.encode(torch.rand(2, 1, 24, 24))
    torch.testing.assert_close(queries.norm(dim=1), torch.ones(2, 3, 3))
    torch.testing.assert_close(network.memory.norm(dim=1), torch.ones(10))
    assert not network.memory.requires_grad


def test_reads_are_soft_mixtures(network):
    queries, _ = network.encode(torch.rand(2, 1, 24, 24))
    flat = queries.movedim(1, -1).flatten(0, -2)
    weights = (flat @ network.memory.T).softmax(dim=1)
    assert weights.min() >= 0.0148
    assert weights.max() <= 0.451
    read = network.read(queries, network.memory).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(read, weights @ network.memory)


@pytest.fixture
def losses_of(make_batch, network):
    """Return a function that computes the loss of a detector."""

    def loss_of(model, network, images):
        ((part, loss),) = model._losses(network, make_batch(images))
        assert part is network
        return loss

    return loss_of


def test_the_decoder_sees_unit_queries_and_what_they_read(network):
    seen = []
    network.decoder[0].register_forward_pre_hook(lambda _, given: seen.extend(given))
    network(torch.rand(2, 1, 24, 24), network.memory)
    assert seen[0].shape == (2, 64, 3, 3)  # twice 8 * width
    torch.testing.assert_close(seen[0][:, :32].norm(dim=1), torch.ones(2, 3, 3))


def test_losses(network, losses_of, small):
    images = torch.rand(2, 1, 24, 24)
    plain = small(MNAD, compactness_weight=0.0, separateness_weight=0.0)
    pixel = losses_of(plain, network.eval(), images)
    result, queries = network(2 * images - 1, network.memory)
    torch.testing.assert_close(pixel, F.mse_loss(result, 2 * images - 1))
    flat = queries.movedim(1, -1).flatten(0, -2)
    order = (flat @ network.memory.T).argsort(dim=1, descending=True)
    first, second = network.memory[order[:, 0]], network.memory[order[:, 1]]
    compact = losses_of(
        small(MNAD, compactness_weight=1.0, separateness_weight=0.0), network, images
    )
    torch.testing.assert_close(compact - pixel, (flat - first).square().mean())
    separate = losses_of(
        small(MNAD, compactness_weight=0.0, separateness_weight=1.0), network, images
    )
    margin = (flat - first).norm(dim=1) - (flat - second).norm(dim=1) + 1
    torch.testing.assert_close(
        separate - pixel, margin.clamp(min=0).mean(), rtol=1e-4, atol=1e-5
    )


def test_the_losses_of_the_items_at_their_limits(network, losses_of, small):
    images = torch.rand(2, 1, 24, 24)
    plain, compact, separate = (
        small(MNAD, compactness_weight=a, separateness_weight=b)
        for a, b in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))
    )
    network.eval()
    queries = network.encode(2 * images - 1)[0].detach()
    # an item for every query: each is its own nearest
    network.memory = queries.movedim(1, -1).flatten(0, -2)
    pixel = losses_of(plain, network, images)
    assert losses_of(compact, network, images) - pixel < 1e-6
    # equal items lie at the same distance, so that the whole margin is missing
    network.memory = unit(1, queries.shape[1]).repeat(4, 1)
    pixel = losses_of(plain, network, images)
    separateness = losses_of(separate, network, images) - pixel
    assert separateness.item() == pytest.approx(1, abs=1e-5)


def test_the_memory_is_written_by_batches_of_the_training_only(
    network, losses_of, small
):
    model, images = small(MNAD), torch.rand(2, 1, 24, 24)
    before = network.memory.clone()
    losses_of(model, network.eval(), images)
    assert torch.equal(network.memory, before)
    losses_of(model, network.train(), images)
    assert not torch.equal(network.memory, before)


def test_scoring_leaves_the_memory_alone(random_images, small):
    X = random_images(8, 24, 24, 1)
    for model in (small(MNAD), small(MNAD, update_at_test=True, update_threshold=1e3)):
        model.fit(X)
        before, names = model.network_.memory.clone(), set(vars(model))
        first = model.score_samples(X)
        np.testing.assert_array_equal(model.score_samples(X), first)
        assert torch.equal(model.network_.memory, before)
        assert set(vars(model)) == names


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_items_have_moved_in_a_fit_and_kept_their_norm(precision, random_images, small):
    model = small(MNAD, precision=precision).fit(random_images(8, 24, 24, 1))
    torch.manual_seed(model._seed)
    before = model._build_network().memory
    after = model.network_.memory
    assert after.dtype == torch.float32
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after.norm(dim=1), torch.ones(10), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*are copies of others")
def test_equal_training_images_have_finite_scores(small):
    X = np.full((6, 16, 16, 1), 0.5)
    assert np.isfinite(small(MNAD).fit(X).score_samples(X)).all()


def test_updates_at_test_depend_on_the_order_and_on_the_gate(random_images, small):
    X, X_test = random_images(8, 24, 24, 1), random_images(6, 24, 24, 1, seed=1)
    model = small(MNAD).fit(X)
    plain = model.score_samples(X_test)
    np.testing.assert_allclose(
        model.score_samples(X_test[::-1])[::-1], plain, rtol=1e-4
    )
    model.set_params(update_at_test=True, update_threshold=0.0)
    np.testing.assert_allclose(model.score_samples(X_test), plain, rtol=1e-4)
    model.set_params(update_threshold=1e3)
    updated = model.score_samples(X_test)
    assert updated[0] == pytest.approx(plain[0], rel=1e-4)  # scored before the update
    assert not np.allclose(updated[1:], plain[1:], rtol=1e-3)
    reverse = model.score_samples(X_test[::-1])[::-1]
    assert not np.allclose(reverse[:-1], updated[:-1], rtol=1e-3)


def test_scores_weigh_error_and_distance(random_images, small):
    X, X_test = random_images(8, 24, 24, 1), random_images(3, 24, 24, 1, seed=1)
    model = small(MNAD).fit(X)
    parts = {}
    for weight in (0.0, 0.3, 1.0):
        parts[weight] = -model.set_params(score_weight=weight).score_samples(X_test)
    np.testing.assert_allclose(
        parts[0.3], 0.3 * parts[1.0] + 0.7 * parts[0.0], rtol=1e-4
    )
    maps = model.localize(X_test)
    psnr = -10 * np.log10(maps.mean(axis=(1, 2)))
    low, high = model.psnr_range_
    np.testing.assert_allclose(parts[1.0], 1 - (psnr - low) / (high - low), rtol=1e-3)
    images = 2 * torch.from_numpy(X_test).permute(0, 3, 1, 2) - 1
    with torch.inference_mode():
        _, queries = model.network_(images, model.network_.memory)
    distances = [
        np.mean(
            [
                min((query - item).norm().item() for item in model.network_.memory)
                for query in own.flatten(1).T
            ]
        )
        for own in queries
    ]
    low, high = model.distance_range_
    np.testing.assert_allclose(
        parts[0.0], (np.array(distances) - low) / (high - low), rtol=1e-3, atol=1e-4
    )
    training = -model.set_params(score_weight=0.5).score_samples(X)
    assert training.min() >= -1e-3
    assert training.max() <= 1 + 1e-3


def test_prediction_sees_the_past_and_maps_the_last_image(random_images, small):
    clips = random_images(8, 5, 24, 24, 1)
    model = small(MNAD, task="prediction").fit(clips)
    maps = model.localize(clips)
    assert maps.shape == (8, 24, 24)
    other = clips.copy()
    other[:, -1] = 0.0
    past = torch.from_numpy(clips[:, :-1, ..., 0]) * 2 - 1  # (n, 4, h, w)
    with torch.inference_mode():
        predicted, _ = model.network_(past, model.network_.memory)
    expected = ((predicted[:, 0] + 1) / 2).square()
    np.testing.assert_allclose(model.localize(other), expected, rtol=1e-3, atol=1e-6)


def test_one_item_is_refused(random_images, small):
    with pytest.raises(ValueError, match="n_items"):
        small(MNAD, n_items=1).fit(random_images(4, 24, 24, 1))
