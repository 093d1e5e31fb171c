import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_settings import TRAINED_BRIEFLY
from torch import nn

from skanomaly._fitting.loop import Samples
from skanomaly.methods.puzzle_ae import (
    FeatureCritic,
    PuzzleAE,
    PuzzleSolver,
    disturb,
    enlarge,
    grey_tile,
    permutations_of_tiles,
    shuffle_tiles,
)

SMALL = {
    "PuzzleAE": {
        "permutations": "transpositions",
        "width": 4,
        "critic_width": 4,
        **TRAINED_BRIEFLY,
        "learning_rate": 5e-3,  # finds the planted defect in a tenth of the time
    }
}
TINY = {"PuzzleAE": {"width": 1, "critic_width": 1}}
PLANTED = {"PuzzleAE": (16, 45)}

IDENTITY = (0, 1, 2, 3)
EVERY_PERMUTATION = list(itertools.permutations(range(4)))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiles_of(image):
    """Return the four tiles of an image (c, s, s), row by row."""
    half = image.shape[-1] // 2
    rows = image[:, :half], image[:, half:]
    return [part for row in rows for part in (row[..., :half], row[..., half:])]


def from_tiles(tiles):
    """Return the image of four tiles."""
    top, bottom = torch.cat(tiles[:2], dim=2), torch.cat(tiles[2:], dim=2)
    return torch.cat([top, bottom], dim=1)


@pytest.fixture
def build():
    """Return a function that makes a detector with an untrained network."""

    def make(shape=(32, 32, 3), **settings):
        settings = {"random_state": 0, **SMALL["PuzzleAE"], **settings}
        model = PuzzleAE(**settings)
        model.image_shape_ = shape
        torch.manual_seed(0)
        model.network_ = model._build_network()
        return model

    return make


@pytest.fixture(scope="module")
def fitted(random_images):
    settings = {**SMALL["PuzzleAE"], "batch_size": 4, "cost_fraction": 0.3}
    return PuzzleAE(random_state=0, **settings).fit(random_images(10, 32, 32, 3))


class Oracle(nn.Module):
    """Solves every puzzle of the images that it knows."""

    def __init__(self, images):
        super().__init__()
        self.images = images

    def forward(self, puzzles):
        return self.images.repeat(len(puzzles) // len(self.images), 1, 1, 1)


class Copies(nn.Module):
    """Returns the puzzle as it is, times a factor, and remembers it."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor
        self.seen = []

    def forward(self, puzzles):
        self.seen.append(puzzles.detach())
        return self.factor * puzzles


# Puzzles


def test_the_permutations_are_the_23_that_move_something_or_the_6_exchanges():
    every, exchanges = map(permutations_of_tiles, ("all", "transpositions"))
    assert len(every) == len(set(every)) == 23
    assert len(exchanges) == len(set(exchanges)) == 6
    assert set(exchanges) < set(every)
    for permutation in every:
        assert sorted(permutation) == [0, 1, 2, 3]
        assert permutation != IDENTITY
    for permutation in exchanges:
        assert sum(i != tile for i, tile in enumerate(permutation)) == 2


@pytest.mark.parametrize("permutation", EVERY_PERMUTATION)
def test_tiles_go_where_the_permutation_says_and_the_inverse_restores_them(permutation):
    images = torch.rand(2, 3, 6, 6)
    shuffled = shuffle_tiles(images, permutation)
    for image, puzzle in zip(images, shuffled, strict=True):
        own = tiles_of(image)
        assert torch.equal(puzzle, from_tiles([own[tile] for tile in permutation]))
    inverse = [permutation.index(slot) for slot in range(4)]
    assert torch.equal(shuffle_tiles(shuffled, inverse), images)


def test_tiles_of_an_oblong_image_change_places():
    images = torch.arange(24.0).view(1, 1, 4, 6)
    shuffled = shuffle_tiles(images, (3, 1, 2, 0))
    assert torch.equal(shuffled[..., :2, :3], images[..., 2:, 3:])
    assert torch.equal(shuffled[..., :2, 3:], images[..., :2, 3:])


@pytest.mark.parametrize("slot", range(4))
def test_one_tile_loses_its_colours(slot):
    images = torch.rand(2, 3, 8, 8)
    before = images.clone()
    for image, puzzle in zip(images, grey_tile(images, slot), strict=True):
        tiles, greyed = tiles_of(image), tiles_of(puzzle)
        for i in range(4):
            assert torch.equal(tiles[i], greyed[i]) == (i != slot)
        expected = tiles[slot].mean(dim=0).expand(3, 4, 4)
        torch.testing.assert_close(greyed[slot], expected)
    assert torch.equal(images, before)
    of_one_channel = tiles_of(grey_tile(images[:, :1], slot)[0])
    assert [not tile.any() for tile in of_one_channel] == [i == slot for i in range(4)]


@pytest.mark.parametrize("kind", ["all", "transpositions"])
def test_training_meets_all_permutations_and_slots(kind, build):
    model = build(permutations=kind)
    image = torch.rand(1, 3, 16, 16)
    tiles, draws, met = tiles_of(image[0]), seeded(), set()
    for _ in range(400):
        puzzle = tiles_of(model._puzzles(image, draws)[0])
        found = [[torch.equal(tile, t) for t in tiles] for tile in puzzle]
        (grey,) = [slot for slot in range(4) if not any(found[slot])]
        (missing,) = [tile for tile in range(4) if not any(f[tile] for f in found)]
        order = [
            missing if slot == grey else found[slot].index(True) for slot in range(4)
        ]
        met.add((tuple(order), grey))
    assert {order for order, _ in met} == set(permutations_of_tiles(kind))
    assert {grey for _, grey in met} == {0, 1, 2, 3}


# The disturbance


@pytest.mark.parametrize(("twice", "most"), [(False, 0.1), (True, 0.2)])
def test_a_disturbance_is_small_and_stays_in_the_range(twice, most):
    puzzles = torch.rand(2, 3, 16, 16)
    target = torch.rand(2, 3, 16, 16)

    def error(point, started):
        return F.mse_loss(point, target)

    found = disturb(puzzles, error, 0.1, starts_twice=twice, generator=seeded())
    assert 0 <= found.min() <= found.max() <= 1
    largest = (found - puzzles).abs().max()
    assert 0.8 * most < largest <= most + 1e-6
    assert error(found, None) > error(puzzles, None)
    assert not found.requires_grad
    same = disturb(puzzles, error, 0.0, starts_twice=twice, generator=seeded())
    assert torch.equal(same, puzzles)


def test_what_is_outside_of_the_range_is_not_cut_off():
    puzzles = 4 * torch.rand(2, 3, 16, 16) - 2
    found = disturb(
        puzzles,
        lambda point, started: point.square().mean(),
        0.1,
        starts_twice=False,
        generator=seeded(),
    )
    assert (found - puzzles).abs().max() <= 0.1 + 1e-6


@pytest.mark.parametrize("attack", ["solution", "puzzle"])
def test_the_disturbance_equals_a_slow_reference(attack, build):
    model = build(attack=attack, epsilon=0.07)
    solver = model.network_["solver"]
    images = torch.rand(2, 3, 32, 32)
    puzzles = shuffle_tiles(images, (1, 0, 2, 3))
    kept = puzzles.clone()
    found = model._disturbed(solver, images, puzzles, seeded(3))
    assert torch.equal(puzzles, kept)

    start = 0.07 * (2 * torch.rand(puzzles.shape, generator=seeded(3)) - 1)
    point = (puzzles + start).clamp(0, 1).requires_grad_()
    solved = solver(point)
    if attack == "solution":
        error = ((solved - images) ** 2).sum() / images.numel()
    else:
        error = ((solved - (puzzles + start)) ** 2).sum() / (2 * 32 * 32)
    error.backward()
    step = torch.empty_like(start)
    for place in itertools.product(*map(range, start.shape)):
        moved = start[place] + 2 * point.grad[place].sign()
        step[place] = max(-0.07, min(0.07, float(moved)))
    begin = puzzles if attack == "solution" else point.detach()
    torch.testing.assert_close(found, (begin + step).clamp(0, 1))


def test_a_disturbance_leaves_no_gradients_and_raises_the_training_loss(build):
    model = build(epsilon=0.1)
    solver = model.network_["solver"]
    gains = []
    for seed in range(5):
        images = torch.rand(2, 3, 32, 32, generator=seeded(seed))
        puzzles = model._puzzles(images, seeded(seed))
        found = model._disturbed(solver, images, puzzles, seeded(seed))
        with torch.no_grad():
            before, after = (F.mse_loss(solver(x), images) for x in (puzzles, found))
        gains.append(float(after - before))
    assert np.mean(gains) > 0
    assert all(parameter.grad is None for parameter in solver.parameters())


# The zoom


def test_enlarging():
    ramp = torch.linspace(0, 1, 32).expand(2, 3, 32, 32).contiguous()
    found = enlarge(ramp, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(found[0], ramp[0])
    centre, slope = 0.5, 1 / 31
    expected = centre + slope * (torch.arange(32) - 15.5) / 2
    torch.testing.assert_close(found[1, 0, 0], expected)


def test_three_in_four_images_are_enlarged(build):
    images = torch.rand(400, 1, 16, 16)
    found = build(shape=(16, 16, 1))._enlarged(images, seeded())
    n_changed = sum(not torch.equal(a, b) for a, b in zip(images, found, strict=True))
    assert 270 < n_changed < 330
    assert build(shape=(16, 16, 1), zoom=None)._enlarged(images, seeded()) is images


@pytest.mark.parametrize("zoom", [(), (1.1,), (0.9, 1.1), (1.2, 1.1), (1, np.inf)])
def test_bad_zooms_are_refused(zoom, random_images):
    with pytest.raises(ValueError, match="zoom="):
        PuzzleAE(**{**SMALL["PuzzleAE"], "zoom": zoom}).fit(random_images(4, 32, 32))


# The networks


@pytest.mark.parametrize(
    ("shape", "width", "solver", "critic"),
    [
        ((128, 128, 3), 64, 17_258_691, 11_164_416),
        ((128, 128, 1), 64, 17_257_409, 11_162_368),
        ((64, 64, 3), 32, 4_316_259, 2_765_568),
        ((32, 32, 3), 16, 1_079_859, 663_296),
        ((28, 28, 1), 64, 17_257_409, 659_456),
    ],
)
def test_paper_size(shape, width, solver, critic):
    model = PuzzleAE(width=width)
    model.image_shape_ = shape
    with torch.device("meta"):
        network = model._build_network()
    counts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in network.items()
    }
    assert counts == {"solver": solver, "critic": critic}


@pytest.mark.parametrize(
    ("side", "features"),
    [(128, (1024, 4, 4)), (32, (256, 4, 4)), (28, (256, 3, 3)), (9, (128, 4, 4))],
)
def test_the_critic_halves_images_down_to_four_pixels(side, features):
    with torch.device("meta"):
        critic = FeatureCritic(3, 64, (side, side))
        images = torch.empty(2, 3, side, side)
        assert critic.features(images).shape == (2, *features)
        assert critic(images).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("size", [(16, 16), (28, 28), (30, 46), (64, 32)])
def test_solutions_have_the_size_of_the_puzzles(size):
    assert PuzzleSolver(3, 2)(torch.rand(2, 3, *size)).shape == (2, 3, *size)


class PlainUNet(nn.Module):
    """The U-Net as the sheet of its layers has it, written out."""

    def __init__(self, c, w):
        super().__init__()

        def double(a, b, d):
            return [nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, d, 3, padding=1)]

        self.inc = nn.ModuleList(double(c, w, w))
        self.down1 = nn.ModuleList(double(w, 2 * w, 2 * w))
        self.down2 = nn.ModuleList(double(2 * w, 4 * w, 4 * w))
        self.down3 = nn.ModuleList(double(4 * w, 8 * w, 8 * w))
        self.down4 = nn.ModuleList(double(8 * w, 8 * w, 8 * w))
        self.up1 = nn.ModuleList(double(16 * w, 8 * w, 4 * w))
        self.up2 = nn.ModuleList(double(8 * w, 4 * w, 2 * w))
        self.up3 = nn.ModuleList(double(4 * w, 2 * w, w))
        self.up4 = nn.ModuleList(double(2 * w, w, w))
        self.out = nn.Conv2d(w, c, 1)

    def forward(self, x):
        def double(layers, x):
            return torch.relu(layers[1](torch.relu(layers[0](x))))

        def up(layers, x, skip):
            n_rows, n_columns = 2 * x.shape[2], 2 * x.shape[3]
            x = nn.UpsamplingBilinear2d(size=(n_rows, n_columns))(x)  # corners aligned
            padded = torch.zeros(*x.shape[:2], *skip.shape[2:])
            top, left = (skip.shape[2] - n_rows) // 2, (skip.shape[3] - n_columns) // 2
            padded[:, :, top : top + n_rows, left : left + n_columns] = x
            return double(layers, torch.cat([skip, padded], dim=1))

        x1 = double(self.inc, x)
        x2 = double(self.down1, nn.MaxPool2d(2)(x1))
        x3 = double(self.down2, nn.MaxPool2d(2)(x2))
        x4 = double(self.down3, nn.MaxPool2d(2)(x3))
        x5 = double(self.down4, nn.MaxPool2d(2)(x4))
        x = up(self.up2, up(self.up1, x5, x4), x3)
        return self.out(up(self.up4, up(self.up3, x, x2), x1))


class PlainDiscriminator(nn.Module):
    """The discriminator for 32 pixels, written out."""

    def __init__(self, c, w):
        super().__init__()
        self.conv1 = nn.Conv2d(c, w, 4, 2, 1, bias=False)
        self.conv2 = nn.Conv2d(w, 2 * w, 4, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * w)
        self.conv3 = nn.Conv2d(2 * w, 4 * w, 4, 2, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * w)
        self.classifier = nn.Conv2d(4 * w, 1, 4, 1, 0, bias=False)

    def forward(self, x):
        x = F.leaky_relu(self.conv1(x), 0.2)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.2)
        features = F.leaky_relu(self.bn3(self.conv3(x)), 0.2)
        return torch.sigmoid(self.classifier(features)), features


def exchange_weights(own, plain):
    values = own.state_dict().values()
    plain.load_state_dict(dict(zip(plain.state_dict(), values, strict=True)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (28, 46)])
def test_the_solver_equals_one_written_from_the_paper(size, training):
    own, plain = PuzzleSolver(3, 3).train(training), PlainUNet(3, 3).train(training)
    exchange_weights(own, plain)
    images = torch.rand(2, 3, *size)
    torch.testing.assert_close(own(images), plain(images), rtol=1e-5, atol=1e-5)


def test_the_critic_equals_one_written_from_the_paper():
    own, plain = FeatureCritic(3, 4, (32, 32)), PlainDiscriminator(3, 4)
    exchange_weights(own, plain)
    for training in (True, False):  # the second with the statistics of the first
        own.train(training), plain.train(training)
        images = torch.rand(3, 3, 32, 32)
        real, _ = plain(images)
        torch.testing.assert_close(own(images).sigmoid(), real, rtol=1e-5, atol=1e-5)
        own.eval(), plain.eval()
        torch.testing.assert_close(
            own.features(images), plain(images)[1], rtol=1e-5, atol=1e-5
        )


# The losses


def test_losses_equal_a_slow_reference(build, make_batch):
    model = build(epsilon=0.05, feature_weight=0.3, permutations="all")
    solver, critic = model.network_["solver"], model.network_["critic"]
    plain = PlainDiscriminator(3, 4)
    exchange_weights(critic, plain)
    images = torch.rand(4, 3, 32, 32)
    losses = list(model._losses(model.network_.train(), make_batch(images, seed=5)))
    assert [part for part, _ in losses] == [solver, critic]

    draws = seeded(5)
    drawn = torch.rand(4, 2, generator=draws)
    target = torch.stack(
        [
            enlarge(image[None], 1.05 + 0.15 * factor[None])[0] if p < 0.75 else image
            for image, (p, factor) in zip(images, drawn, strict=True)
        ]
    )
    assert not torch.equal(target, images)
    number = int(torch.randint(23, (), generator=draws))
    order = permutations_of_tiles("all")[number]
    slot = int(torch.randint(4, (), generator=draws))
    puzzles = []
    for image in target:
        tiles = [tiles_of(image)[tile] for tile in order]
        tiles[slot] = tiles[slot].mean(dim=0, keepdim=True).expand(3, 16, 16)
        puzzles.append(from_tiles(tiles))
    puzzles = torch.stack(puzzles)
    start = 0.05 * (2 * torch.rand(puzzles.shape, generator=draws) - 1)
    point = (puzzles + start).clamp(0, 1).requires_grad_()
    ((solver(point) - target) ** 2).mean().backward()
    step = (start + 2 * point.grad.sign()).clamp(-0.05, 0.05)
    solved = solver((puzzles + step).clamp(0, 1))

    real, real_features = plain(target)
    fake, fake_features = plain(solved)
    mse = ((solved - target) ** 2).mean()
    expected = mse + 0.3 * ((real_features - fake_features) ** 2).mean()
    torch.testing.assert_close(losses[0][1], expected, rtol=1e-4, atol=1e-6)
    expected = 0.5 * (
        F.binary_cross_entropy(real, torch.ones_like(real))
        + F.binary_cross_entropy(fake, torch.zeros_like(fake))
    )
    torch.testing.assert_close(losses[1][1], expected, rtol=1e-4, atol=1e-6)

    errors = []
    ((part, held_out),) = model._losses(
        model.network_.eval(), make_batch(images, seed=5), errors=errors
    )
    assert part is solver
    torch.testing.assert_close(held_out, mse)
    assert not errors  # the learning rate follows the training


def test_the_critic_matches_nothing_where_the_solution_is_perfect(build, make_batch):
    model = build(zoom=None, epsilon=0.0)
    images = torch.rand(4, 3, 32, 32)
    network = nn.ModuleDict(model.network_)
    network["solver"] = Oracle(images)
    network["critic"].eval()
    (_, loss), _ = model._losses(network, make_batch(images))
    assert loss == 0


def test_each_part_learns_from_its_own_loss(build, make_batch):
    model = build()
    network = model.network_
    steps = model._losses(network, make_batch(torch.rand(4, 3, 32, 32)))
    _, of_solver = next(steps)
    # the solver steps before the critic's loss is descended
    parameters = list(network["solver"].parameters())
    gradients = torch.autograd.grad(of_solver, parameters)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[::2])
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1.0)
    _, of_critic = next(steps)
    of_critic.backward()
    assert all(parameter.grad is None for parameter in parameters)
    assert all(p.grad is not None for p in network["critic"].parameters())


def test_rates_momenta_and_decay(build):
    model = build(learning_rate=1e-3)
    groups = {
        name: model._optimizer(part).param_groups[0]
        for name, part in model.network_.items()
    }
    names = "lr", "betas", "weight_decay"
    found = {name: [group[n] for n in names] for name, group in groups.items()}
    assert found == {
        "solver": [1e-3, (0.9, 0.999), 1e-5],
        "critic": [pytest.approx(2e-4), (0.5, 0.999), 0],
    }


def test_the_rate_falls_where_the_error_does_not(build):
    model = build(learning_rate=1e-3)
    parts = {name: model._optimizer(part) for name, part in model.network_.items()}
    model._optimizers = {model.network_[name]: parts[name] for name in parts}
    errors = []
    assert model._plateau(parts["critic"], errors) is None
    schedule = model._plateau(parts["solver"], errors)
    rates = []
    for error in [2.0, 1.0] + 102 * [1.0]:
        errors += [torch.tensor(error + 0.5), torch.tensor(error - 0.5)]
        schedule.step()
        rates.append(parts["solver"].param_groups[0]["lr"])
    assert not errors
    assert np.flatnonzero(np.diff(rates)).tolist() == [51, 102]
    assert rates[-1] == pytest.approx(0.64e-3)


def test_a_fit_that_was_killed_goes_on_with_its_rate(
    monkeypatch, random_images, tmp_path
):
    class Killed(BaseException):
        pass

    def killing(self, network, batch, **given):
        if len(self.loss_curve_) == 5:
            raise Killed
        yield from losses(self, network, batch, **given)

    # no error is lower by nine tenths, so that the rate falls in every second epoch
    plateau = {"factor": 0.5, "patience": 1, "threshold": 0.9}
    monkeypatch.setattr("skanomaly.methods.puzzle_ae.PLATEAU", plateau)
    X, losses = random_images(8, 16, 16), PuzzleAE._losses
    settings = {**SMALL["PuzzleAE"], "max_epochs": 6, "random_state": 0}
    expected = PuzzleAE(**settings).fit(X)
    rates = [
        optimizer.param_groups[0]["lr"] for optimizer in expected._optimizers.values()
    ]
    assert rates == [pytest.approx(5e-3 / 4), pytest.approx(1e-3)]
    settings |= {"checkpoint": tmp_path / "progress", "checkpoint_every": 3}
    with monkeypatch.context() as patch:
        patch.setattr(PuzzleAE, "_losses", killing)
        with pytest.raises(Killed):
            PuzzleAE(**settings).fit(X)
    found = PuzzleAE(**settings).fit(X)
    assert found.loss_curve_ == expected.loss_curve_
    np.testing.assert_array_equal(found.permutation_costs_, expected.permutation_costs_)


def test_without_its_weight_there_is_no_critic(random_images):
    settings = {**SMALL["PuzzleAE"], "feature_weight": 0, "random_state": 0}
    model = PuzzleAE(**settings).fit(random_images(6, 32, 32, 3))
    assert set(model.network_) == {"solver"}
    assert model.loss_curve_[0] > 0


# The judgement


def errors_of(solver, images, permutations):
    """Return the error of each permutation at each pixel: (n, n_permutations, h, w)."""
    result = []
    with torch.inference_mode():
        for image in images:
            maps = []
            for order in permutations:
                puzzle = from_tiles([tiles_of(image)[tile] for tile in order])
                solved = solver(puzzle[None])[0]
                maps.append(((image - solved) ** 2).mean(dim=0))
            result.append(torch.stack(maps))
    return torch.stack(result).numpy()


def test_costs_and_scores_equal_a_slow_reference(fitted, random_images):
    X = random_images(10, 32, 32, 3)
    images = torch.from_numpy(X).permute(0, 3, 1, 2)
    permutations = permutations_of_tiles("transpositions")
    solver = fitted.network_["solver"]
    held_out = torch.randperm(10, generator=seeded(fitted._seed))[:3].sort()[0]
    errors = errors_of(solver, images[held_out], permutations)
    costs = errors.mean(axis=(0, 2, 3))
    assert (costs > 0).all()
    np.testing.assert_allclose(fitted.permutation_costs_, costs, rtol=1e-4)

    every = errors_of(solver, images, permutations)
    expected = (every.mean(axis=(2, 3)) / costs).mean(axis=1)
    np.testing.assert_allclose(-fitted.score_samples(X), expected, rtol=1e-4)
    unsmoothed = PuzzleAE.localize(_with(fitted, smoothing_size=1), X)
    maps = (every / costs[:, None, None]).mean(axis=1)
    np.testing.assert_allclose(unsmoothed, maps, rtol=1e-3, atol=1e-5)
    smooth = fitted.localize(X)[0, 5, 7]  # 21 pixels of 256 are 3 of 32
    np.testing.assert_allclose(smooth, maps[0, 4:7, 6:9].mean(), rtol=1e-3)
    by_maximum = _with(fitted, image_score="max")
    np.testing.assert_allclose(
        -by_maximum.score_samples(X), fitted.localize(X).max(axis=(1, 2)), rtol=1e-6
    )


def _with(fitted, **settings):
    model = PuzzleAE.__new__(PuzzleAE)
    vars(model).update(vars(fitted))
    return model.set_params(**settings)


def test_a_constant_times_errors_and_cost_of_a_permutation_changes_nothing(fitted):
    images = torch.rand(3, 3, 32, 32)
    model = _with(fitted)
    errors = torch.rand(3, 6, 32, 32)
    model._errors = lambda images, generator: errors
    expected = model._judge(images, maps_wanted=True, generator=None)
    order = [3, 1, 0, 5, 4, 2]
    factors = torch.tensor([1, 1, 7.0, 1, 0.1, 1])
    model._errors = lambda images, generator: errors[:, order] * factors[:, None, None]
    model.permutation_costs_ = fitted.permutation_costs_[order] * factors.numpy()
    found = model._judge(images, maps_wanted=True, generator=None)
    torch.testing.assert_close(found, expected)


def test_images_for_the_costs_are_not_trained_on(monkeypatch, random_images):
    X = random_images(10, 32, 32, 3)
    seen, judged = [], []
    batch, errors = Samples.batch, PuzzleAE._errors

    def watched(self, indices, step, generator):
        result = batch(self, indices, step, generator)
        seen.append(result.images)
        return result

    def watched_errors(self, images, generator):
        judged.append(images)
        return errors(self, images, generator)

    monkeypatch.setattr(Samples, "batch", watched)
    monkeypatch.setattr(PuzzleAE, "_errors", watched_errors)
    settings = {**SMALL["PuzzleAE"], "n_iter_no_change": 3, "cost_fraction": 0.2}
    for seed in (0, 0, 1):
        PuzzleAE(random_state=seed, **settings).fit(X)

    def rows(images):
        pixels = images.permute(0, 2, 3, 1).numpy()
        return [int(np.flatnonzero((p == X).all(axis=(1, 2, 3)))[0]) for p in pixels]

    # of each fit: 2 images for the costs, then all 10 in batches for the thresholds
    per_fit = len(judged) // 3
    for_costs = [rows(judged[i * per_fit]) for i in range(3)]
    assert for_costs[0] == for_costs[1] != for_costs[2]
    assert all(len(chosen) == 2 for chosen in for_costs)
    trained = len(seen) // 3
    for i in range(3):
        met = {row for images in seen[i * trained :][:trained] for row in rows(images)}
        assert met == set(range(10)) - set(for_costs[i])


@pytest.mark.parametrize("n", [2, 3])
def test_few_images_are_enough(n, random_images):
    X = random_images(n, 32, 32)
    model = PuzzleAE(**SMALL["PuzzleAE"]).fit(X)
    assert model.localize(X).shape == (n, 32, 32)


@pytest.mark.parametrize("size", [(32, 32), (37, 45), (9, 20)])
def test_a_perfect_solver_leaves_nothing_whatever_the_size(size, random_images):
    X = random_images(4, *size, 3)
    model = PuzzleAE(random_state=0, **SMALL["PuzzleAE"]).fit(X)
    images = torch.from_numpy(X).permute(0, 3, 1, 2)
    height, width = size
    padded = F.pad(
        images, (0, max(width % 2, 16 - width), 0, max(height % 2, 16 - height))
    )
    model.network_["solver"] = Oracle(padded)
    np.testing.assert_array_equal(model.localize(X), np.zeros((4, *size)))
    np.testing.assert_array_equal(model.score_samples(X), np.zeros(4))
    model.permutation_costs_ = np.zeros(6, np.float32)  # its own costs
    np.testing.assert_array_equal(model.score_samples(X), np.zeros(4))


@pytest.mark.parametrize("kind", ["all", "transpositions"])
def test_a_prediction_solves_the_puzzles_of_the_training(kind, build, monkeypatch):
    model = build(permutations=kind)
    stub = model.network_["solver"] = Copies()
    images = torch.rand(2, 3, 16, 16)
    errors = model._errors(images, None)
    permutations = permutations_of_tiles(kind)
    expected = [shuffle_tiles(images, order) for order in permutations]
    assert torch.equal(torch.cat(stub.seen), torch.cat(expected))
    # however many pass the network together
    monkeypatch.setattr("skanomaly.methods.puzzle_ae.PIXELS_TOGETHER", 5 * 512)
    stub.seen.clear()
    assert torch.equal(model._errors(images, None), errors)
    assert [len(seen) for seen in stub.seen][:-1] == [10] * (
        (len(permutations) - 1) // 5
    )


def test_the_exported_graph_gives_the_same(random_images, tmp_path):
    export = pytest.importorskip("skanomaly.onnx").export
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    X = (255 * random_images(6, 29, 32, 3)).astype(np.uint8)
    settings = {**SMALL["PuzzleAE"], "image_score": "max"}
    model = PuzzleAE(random_state=0, **settings).fit(X)
    export(model, tmp_path / "model.onnx", batch_size=2)
    session = ort.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    maps, scores = session.run(["maps", "scores"], {"images": X[:2]})
    np.testing.assert_allclose(maps, model.localize(X[:2]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores, model.score_samples(X[:2]), rtol=1e-4)


def discs(n, centre, seed):
    """Make noisy images of a bright disc, and the mask of the disc."""
    rows, columns = np.mgrid[:32, :32]
    disc = (rows - centre) ** 2 + (columns - centre) ** 2 < 36
    noise = np.random.default_rng(seed).normal(0, 0.02, (n, 32, 32))
    return (0.2 + 0.5 * disc + noise).clip(0, 1).astype(np.float32), disc


def test_a_misplaced_part_is_found():
    settings = {"zoom": None, "feature_weight": 0, "max_epochs": 40}
    model = PuzzleAE(random_state=0, **{**SMALL["PuzzleAE"], **settings})
    model.fit(discs(16, 22, seed=0)[0])
    normal, usual_place = discs(4, 22, seed=1)
    moved, place = discs(4, 9, seed=2)
    assert model.score_samples(moved).max() < 2 * model.score_samples(normal).min()
    maps = model.localize(moved)
    assert (
        maps[:, place | usual_place].mean() > 3 * maps[:, ~(place | usual_place)].mean()
    )
