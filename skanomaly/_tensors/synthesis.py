"""Synthetic defects: foreign textures under masks of Perlin noise.

All functions draw from a generator on the CPU that is handed to them, so that a seed
gives the same defects on every device; the images themselves are made on the device
asked for.
"""

import math

import torch
import torch.nn.functional as F

from .filters import full_precision

MASK_DRAWS = 10


def uniform(low, high, *shape, generator):
    """Draw from the uniform distribution on [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def perlin_noise(cells, height, width, *, generator, device="cpu"):
    """Draw fields of Perlin noise.

    Random unit gradients stand at the corners of a lattice; between the corners their
    ramps are blended by a quintic fade.

    Parameters
    ----------
    cells : torch.Tensor of shape (n, 2)
        Numbers of lattice cells along the height and the width of each field.
    height, width : int
        Size of the fields in pixels.
    generator : torch.Generator
        What is drawn from.
    device : torch.device or str, default="cpu"
        Where the fields are made.

    Returns
    -------
    torch.Tensor of shape (n, height, width)
        Noise within [-1, 1], 0 at the corners of the lattice.

    References
    ----------
    K. Perlin. "Improving noise". ACM Transactions on Graphics, 2002.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.synthesis import perlin_noise
    >>> cells, generator = torch.tensor([[2, 4]]), torch.Generator()
    >>> noise = perlin_noise(cells, 32, 32, generator=generator)
    >>> noise.shape
    torch.Size([1, 32, 32])
    >>> noise[0, 0, 8].item()
    0.0
    """
    n_fields, n_corners = len(cells), int(cells.max()) + 1
    shape = n_fields, n_corners, n_corners
    angles = uniform(0, 2 * math.pi, *shape, generator=generator).to(device)
    gradients_y, gradients_x = angles.sin(), angles.cos()
    cells = cells.to(device)
    y = torch.arange(height, device=device) * cells[:, :1] / height  # (n, h)
    x = torch.arange(width, device=device) * cells[:, 1:] / width  # (n, w)
    row, column = y.long(), x.long()
    y, x = (y - row)[:, :, None], (x - column)[:, None, :]
    field = torch.arange(n_fields, device=device)[:, None, None]

    def ramp(down, right):
        corner = field, (row + down)[:, :, None], (column + right)[:, None, :]
        return gradients_y[corner] * (y - down) + gradients_x[corner] * (x - right)

    fade_y, fade_x = (t**3 * (t * (6 * t - 15) + 10) for t in (y, x))
    upper = torch.lerp(ramp(0, 0), ramp(0, 1), fade_x)  # (n, h, w)
    lower = torch.lerp(ramp(1, 0), ramp(1, 1), fade_x)
    return math.sqrt(2) * torch.lerp(upper, lower, fade_y)


def random_lattices(n, height, width, *, generator):
    """Draw lattices of 1 to 32 cells a side, none of whose cells is below 8 pixels.

    Parameters
    ----------
    n : int
        Number of lattices.
    height, width : int
        Size of the images in pixels.
    generator : torch.Generator
        What is drawn from.

    Returns
    -------
    torch.Tensor of shape (n, 2)
        Numbers of cells, powers of two, along the height and the width.
    """
    largest = [max(0, min(5, int(math.log2(side / 8)))) for side in (height, width)]
    exponents = [
        torch.randint(0, most + 1, (n,), generator=generator) for most in largest
    ]
    return 2 ** torch.stack(exponents, dim=1)


@full_precision
def rotate(images, degrees, *, mode="bilinear"):
    """Rotate images about their centre; zeros come in from outside.

    Parameters
    ----------
    images : torch.Tensor of shape (b, c, h, w)
        Images.
    degrees : torch.Tensor of shape (b,)
        Angles in degrees.
    mode : {"bilinear", "nearest"}, default="bilinear"
        How the images are interpolated.

    Returns
    -------
    torch.Tensor of shape (b, c, h, w)
        The rotated images.
    """
    height, width = images.shape[-2:]
    radians = torch.deg2rad(degrees)
    cosine, sine, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    rows = [
        torch.stack([cosine, -sine * height / width, zero], dim=1),
        torch.stack([sine * width / height, cosine, zero], dim=1),
    ]
    theta = torch.stack(rows, dim=1).to(images.device)  # (b, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode=mode, align_corners=False)


def perlin_masks(n, height, width, *, generator, device="cpu"):
    """Draw masks of irregular patches by thresholding rotated Perlin noise.

    Parameters
    ----------
    n : int
        Number of masks.
    height, width : int
        Size in pixels.
    generator : torch.Generator
        What is drawn from.
    device : torch.device or str, default="cpu"
        Where the masks are made.

    Returns
    -------
    torch.Tensor of shape (n, 1, height, width)
        1 inside the patches and 0 outside. A mask that came out empty is drawn again,
        up to 10 times, and may still be empty at last.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.synthesis import perlin_masks
    >>> perlin_masks(2, 64, 64, generator=torch.Generator()).unique()
    tensor([0., 1.])
    """
    masks = torch.zeros(n, 1, height, width, device=device)
    for _ in range(MASK_DRAWS):
        empty = torch.nonzero(~masks.flatten(1).any(dim=1))[:, 0]
        if len(empty) == 0:
            break
        lattices = random_lattices(len(empty), height, width, generator=generator)
        noise = perlin_noise(
            lattices, height, width, generator=generator, device=device
        )
        degrees = uniform(-90, 90, len(empty), generator=generator)
        noise = rotate(noise[:, None], degrees)
        masks[empty] = (noise > 0.5).float()
    return masks


def procedural_textures(n, channels, height, width, *, generator):
    """Make textures of two random colours mixed by Perlin noise.

    From smooth clouds over camouflage patterns to flat colours, they stand in for
    photographs of textures.

    Parameters
    ----------
    n, channels, height, width : int
        Number and size of the textures.
    generator : torch.Generator
        What is drawn from.

    Returns
    -------
    torch.Tensor of shape (n, channels, height, width)
        Textures as uint8.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.synthesis import procedural_textures
    >>> procedural_textures(4, 3, 32, 32, generator=torch.Generator()).shape
    torch.Size([4, 3, 32, 32])
    """
    textures = torch.empty(n, channels, height, width, dtype=torch.uint8)
    for chunk in textures.split(32):
        n_made = len(chunk)
        lattices = random_lattices(3 * n_made, height, width, generator=generator)
        octaves = perlin_noise(lattices, height, width, generator=generator)
        octaves = octaves.view(-1, 3, height, width)
        weights = torch.rand(n_made, 3, 1, 1, generator=generator)
        field = (octaves * weights).sum(dim=1, keepdim=True)
        sharpness = 10 ** uniform(-1, 2, n_made, 1, 1, 1, generator=generator)
        mixture = torch.sigmoid(sharpness * field)  # (n_made, 1, h, w)
        colours = torch.rand(2, n_made, channels, 1, 1, generator=generator)
        first, second = 255 * colours
        chunk.copy_(torch.lerp(first, second, mixture))
    return textures


def augment_textures(textures, *, generator):
    """Change the look of textures by three of ten random operations each.

    Parameters
    ----------
    textures : torch.Tensor of shape (b, c, h, w)
        Textures in [0, 1].
    generator : torch.Generator
        What is drawn from.

    Returns
    -------
    torch.Tensor of shape (b, c, h, w)
        The changed textures, in [0, 1].

    Notes
    -----
    The operations are those of DRAEM's code with its ranges: gamma contrast by channel,
    brightness, sharpness, hue and saturation, solarisation, posterisation, inversion,
    automatic contrast, equalisation and rotation. Brightness is the luma throughout,
    where the code draws among several colour spaces; saturation is scaled, not shifted.
    """
    from torchvision.transforms.v2 import functional as tv

    def draws(low, high, *shape):
        return uniform(low, high, *shape, generator=generator)

    def draw(low, high):
        return draws(low, high, 1).item()

    operations = [
        lambda t: t ** draws(0.5, 2.0, *t.shape[:2], 1, 1).to(t.device),
        lambda t: t + draw(-0.2, 0.2) * tv.rgb_to_grayscale(t) + draw(-30, 30) / 255,
        lambda t: tv.adjust_sharpness(t, draw(0, 2)),
        lambda t: tv.adjust_saturation(
            tv.adjust_hue(t, draw(-50, 50) / 255), draw(0.8, 1.2)
        ),
        lambda t: tv.solarize(t, draw(32, 128) / 255) if draw(0, 1) < 0.5 else t,
        lambda t: tv.posterize(t, int(draw(1, 9))),
        lambda t: 1 - t,
        lambda t: _stretched(t, draw(0, 0.2)),
        tv.equalize,
        lambda t: rotate(t, draws(-45, 45, 1).expand(len(t))),
    ]
    augmented = torch.empty_like(textures)
    for index in range(len(textures)):
        texture = textures[index : index + 1]
        if texture.shape[1] not in (1, 3):  # torchvision knows grey and RGB images only
            texture = texture.transpose(0, 1)
        order = torch.randperm(len(operations), generator=generator)
        for choice in order[:3].tolist():
            texture = operations[choice](texture).clamp(0, 1)
        augmented[index] = texture.view_as(augmented[index])
    return augmented


def _stretched(images, share):
    """Stretch each channel to [0, 1], without the share of pixels at either end."""
    values = images.flatten(2).sort(dim=2).values[..., None]
    n_cut = round(share * (values.shape[2] - 1))
    low, high = values[:, :, [n_cut]], values[:, :, [-1 - n_cut]]
    return torch.where(high > low, (images - low) / (high - low), images)


def blend(images, textures, masks, opacity):
    """Lay textures over images where masks are 1.

    Parameters
    ----------
    images, textures : torch.Tensor of shape (b, c, h, w)
        What lies below and above.
    masks : torch.Tensor of shape (b, 1, h, w)
        1 where the texture lies, 0 elsewhere.
    opacity : torch.Tensor of shape (b, 1, 1, 1)
        Weight of the texture: 1 hides the image, 0 leaves it.

    Returns
    -------
    torch.Tensor of shape (b, c, h, w)
        The blended images, equal to ``images`` where the mask is 0.
    """
    return images + masks * opacity * (textures - images)
