"""Similarity maps and loss terms, computed in float32 even under autocast."""

import torch
import torch.nn.functional as F

from .filters import full_precision, make_gaussian_filter, prewitt

# keeps the quotient stable where both gradients vanish, for values in [0, 1]
GMS_CONSTANT = 0.0026

# values of a batch of which a processor's cache holds a dozen copies
CACHED_VALUES = 200_000


@full_precision
def ssim_map(
    images,
    references,
    *,
    data_range=1.0,
    window_size=11,
    sigma=1.5,
    constants=(1e-4, 9e-4),
    padding="zeros",
):
    """Compute the structural similarity of two batches of images at every pixel.

    Parameters
    ----------
    images, references : torch.Tensor of shape (b, c, h, w)
        Images to compare, channel by channel.
    data_range : float or torch.Tensor of shape (), default=1.0
        Difference between the largest and the smallest possible value.
    window_size : int, default=11
        Odd side length of the Gaussian window in pixels.
    sigma : float, default=1.5
        Standard deviation of the Gaussian window in pixels.
    constants : tuple of float, default=(1e-4, 9e-4)
        Stabilisers of luminance and structure for a range of 1; larger ones damp
        regions of low contrast.
    padding : {"zeros", "reflect"}, default="zeros"
        What stands beyond the border: zeros, as in the codes of DRAEM and RIAD, or the
        mirrored images.

    Returns
    -------
    torch.Tensor of shape (b, c, h, w)
        Similarities of at most 1, which equal images reach.

    References
    ----------
    Z. Wang, A. Bovik, H. Sheikh, E. Simoncelli. "Image quality assessment: from error
    visibility to structural similarity". IEEE Transactions on Image Processing, 2004.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.losses import ssim_map
    >>> image = torch.rand(1, 3, 16, 16)
    >>> torch.allclose(ssim_map(image, image), torch.ones(1, 3, 16, 16))
    True
    """
    c1, c2 = (
        torch.as_tensor(constant * data_range**2).to(images) for constant in constants
    )

    blur = make_gaussian_filter(images, sigma, window_size // 2, padding)

    def similarities(x, y):
        # planes that are read again and again should lie one after the other
        x, y = x.contiguous(), y.contiguous()
        mean_x, mean_y = blur(x), blur(y)
        # 2 E[x] E[y] + c1 and E[x]^2 + E[y]^2 + c1
        mean_product = torch.addcmul(c1, mean_x, mean_y, value=2)
        mean_power = torch.addcmul(c1, mean_x, mean_x).addcmul_(mean_y, mean_y)
        # what no way back needs is overwritten
        covariance = blur(2 * x * y).sub_(mean_product).add_(c1 + c2)
        variances = blur((x * x).addcmul_(y, y)).sub_(mean_power).add_(c1 + c2)
        return mean_product / mean_power * (covariance / variances)

    n_together = len(images)
    if images.device.type == "cpu":
        n_together = max(1, CACHED_VALUES // max(1, images[:1].numel()))
    batches = zip(images.split(n_together), references.split(n_together), strict=True)
    return torch.cat([similarities(x, y) for x, y in batches])


def ssim_loss(images, references, **settings):
    """Compute one minus the mean structural similarity.

    Parameters
    ----------
    images, references : torch.Tensor of shape (b, c, h, w)
        Images to compare.
    **settings : dict
        Keyword arguments of `ssim_map`.

    Returns
    -------
    torch.Tensor of shape ()
        The loss, 0 for equal images.

    See Also
    --------
    ssim_map : The similarity at every pixel.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.losses import ssim_loss
    >>> image = torch.rand(1, 3, 16, 16)
    >>> abs(ssim_loss(image, image).item()) < 1e-6
    True
    """
    return 1 - ssim_map(images, references, **settings).mean()


@full_precision
def gms_map(images, references):
    """Compute the gradient magnitude similarity of two batches of images.

    Parameters
    ----------
    images, references : torch.Tensor of shape (b, c, h, w)
        Images with values in [0, 1], compared channel by channel.

    Returns
    -------
    torch.Tensor of shape (b, c, h, w)
        Similarities in (0, 1], 1 where the gradient magnitudes agree.

    References
    ----------
    W. Xue, L. Zhang, X. Mou, A. Bovik. "Gradient magnitude similarity deviation".
    IEEE Transactions on Image Processing, 2014. arXiv 1308.3052.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.losses import gms_map
    >>> image = torch.rand(1, 3, 8, 8)
    >>> torch.allclose(gms_map(image, image + 0.1), torch.ones(1, 3, 8, 8))
    True
    """
    x, y = _gradient_magnitude(images), _gradient_magnitude(references)
    return (2 * x * y + GMS_CONSTANT) / (x**2 + y**2 + GMS_CONSTANT)


def _gradient_magnitude(images):
    dy, dx = prewitt(images)
    # the square root has no finite slope at zero, where every flat region lies
    return torch.sqrt(dy**2 + dx**2 + 1e-12)


@full_precision
def msgms_loss(images, references, *, n_scales=4):
    """Compute one minus the multi-scale gradient magnitude similarity.

    Parameters
    ----------
    images, references : torch.Tensor of shape (b, c, h, w)
        Images with values in [0, 1].
    n_scales : int, default=4
        Number of scales; each halves the images of the one before by 2 x 2 averages.

    Returns
    -------
    torch.Tensor of shape ()
        Mean over the scales of one minus the mean similarity, 0 for equal images.

    See Also
    --------
    msgms_map : The similarity at every pixel.

    References
    ----------
    V. Zavrtanik, M. Kristan, D. Skočaj. "Reconstruction by inpainting for visual
    anomaly detection". Pattern Recognition, 2021.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.losses import msgms_loss
    >>> image = torch.rand(1, 3, 32, 32)
    >>> abs(msgms_loss(image, image).item()) < 1e-6
    True
    """
    maps = _gms_pyramid(images, references, n_scales)
    return 1 - torch.stack([level.mean() for level in maps]).mean()


@full_precision
def msgms_map(images, references, *, n_scales=4):
    """Compute the multi-scale gradient magnitude similarity at every pixel.

    Parameters
    ----------
    images, references : torch.Tensor of shape (b, c, h, w)
        Images with values in [0, 1].
    n_scales : int, default=4
        Number of scales; each halves the images of the one before by 2 x 2 averages.

    Returns
    -------
    torch.Tensor of shape (b, h, w)
        Similarities in (0, 1], averaged over the channels and, interpolated to the
        full size, over the scales.

    See Also
    --------
    msgms_loss : One minus its mean, for training.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.losses import msgms_map
    >>> image = torch.rand(1, 3, 32, 32)
    >>> torch.allclose(msgms_map(image, image), torch.ones(1, 32, 32))
    True
    """
    levels = [
        F.interpolate(
            level.mean(dim=1, keepdim=True), size=images.shape[-2:], mode="bilinear"
        )
        for level in _gms_pyramid(images, references, n_scales)
    ]
    return torch.stack(levels).mean(dim=0)[:, 0]


def _gms_pyramid(images, references, n_scales):
    """Yield the similarity of images and of ever smaller versions of them."""
    yield gms_map(images, references)
    for _ in range(n_scales - 1):
        # a side of one pixel stays one pixel
        size = [2 if side > 1 else 1 for side in images.shape[-2:]]
        images, references = F.avg_pool2d(images, size), F.avg_pool2d(references, size)
        yield gms_map(images, references)


def gradient_penalty(critic, real, fake, *, generator):
    """Compute how far a critic's slope is from 1 between real and generated images.

    Parameters
    ----------
    critic : callable
        ``critic(images)`` returns scores of shape (b, ...), of which the mean over all
        but the first axis is taken.
    real, fake : torch.Tensor of shape (b, c, h, w)
        Real and generated images. One point is drawn on the line between each pair.
    generator : torch.Generator
        What is drawn from, on the CPU.

    Returns
    -------
    torch.Tensor of shape ()
        Mean squared difference of the norm of the gradient from 1.

    References
    ----------
    I. Gulrajani, F. Ahmed, M. Arjovsky, V. Dumoulin, A. Courville. "Improved training
    of Wasserstein GANs". NeurIPS 2017. arXiv 1704.00028.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.losses import gradient_penalty
    >>> real, fake = torch.rand(2, 4, 1, 8, 8)
    >>> generator = torch.Generator()
    >>> gradient_penalty(lambda x: 0 * x, real, fake, generator=generator).item()
    1.0
    """
    place = torch.rand(len(real), 1, 1, 1, generator=generator).to(real.device)
    between = (place * real + (1 - place) * fake).detach().requires_grad_()
    scores = critic(between).float().flatten(1).mean(dim=1)
    (slopes,) = torch.autograd.grad(scores.sum(), between, create_graph=True)
    # the square root has no finite slope at zero
    norms = (slopes.flatten(1).square().sum(dim=1) + 1e-12).sqrt()
    return (norms - 1).square().mean()


@full_precision
def gaussian_divergence(means, log_variances):
    """Compute the Kullback-Leibler divergence of Gaussians from the standard one.

    Parameters
    ----------
    means, log_variances : torch.Tensor of shape (b, d)
        Parameters of Gaussians with independent coordinates.

    Returns
    -------
    torch.Tensor of shape (b,)
        Divergences, 0 for the standard Gaussian.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.losses import gaussian_divergence
    >>> gaussian_divergence(torch.zeros(1, 4), torch.zeros(1, 4))
    tensor([0.])
    """
    return 0.5 * (means**2 + log_variances.exp() - 1 - log_variances).sum(dim=1)


@full_precision
def focal_loss(logits, targets, *, gamma=2.0):
    """Compute the focal loss, which gives little weight to what is already right.

    Parameters
    ----------
    logits : torch.Tensor of shape (b, n_classes, h, w)
        Unnormalised log probabilities of the classes at every pixel.
    targets : torch.Tensor of shape (b, h, w)
        Integer index of the true class of every pixel.
    gamma : float, default=2.0
        Strength of the focus; 0 is the cross-entropy.

    Returns
    -------
    torch.Tensor of shape ()
        Mean over the pixels of ``-(1 - p)**gamma * log(p)``, where ``p`` is the
        probability of the true class.

    References
    ----------
    T. Lin, P. Goyal, R. Girshick, K. He, P. Dollár. "Focal loss for dense object
    detection". ICCV 2017.

    Examples
    --------
    >>> import torch
    >>> from skanomaly._tensors.losses import focal_loss
    >>> logits = torch.zeros(1, 2, 4, 4)
    >>> targets = torch.ones(1, 4, 4, dtype=torch.int64)
    >>> round(focal_loss(logits, targets).item(), 4)
    0.1733
    """
    log_p = F.log_softmax(logits, dim=1).gather(1, targets[:, None])
    return -((1 - log_p.exp()) ** gamma * log_p).mean()
