"""Similarity maps and loss terms, computed in float32 even under autocast."""

import torch
import torch.nn.functional as F

from .filters import full_precision, gaussian_blur, prewitt


@full_precision
def ssim_map(images, references, *, data_range=1.0, window_size=11, sigma=1.5):
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

    Returns
    -------
    torch.Tensor of shape (b, c, h, w)
        Similarities of at most 1, which equal images reach.

    Notes
    -----
    Beyond the border stand zeros, as in the codes of DRAEM and RIAD.

    References
    ----------
    Z. Wang, A. Bovik, H. Sheikh, E. Simoncelli. "Image quality assessment: from error
    visibility to structural similarity". IEEE Transactions on Image Processing, 2004.

    Examples
    --------
    >>> import torch
    >>> from skanomaly.losses import ssim_map
    >>> image = torch.rand(1, 3, 16, 16)
    >>> torch.allclose(ssim_map(image, image), torch.ones(1, 3, 16, 16))
    True
    """
    moments = torch.stack(
        [images, references, images**2, references**2, images * references]
    )
    mean_x, mean_y, square_x, square_y, product = gaussian_blur(
        moments, sigma, radius=window_size // 2, padding="zeros"
    )
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    covariance = product - mean_x * mean_y
    variances = square_x - mean_x**2 + square_y - mean_y**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)


def ssim_loss(images, references, *, data_range=1.0, window_size=11, sigma=1.5):
    """Compute one minus the mean structural similarity.

    Parameters
    ----------
    images, references : torch.Tensor of shape (b, c, h, w)
        Images to compare.
    data_range : float or torch.Tensor of shape (), default=1.0
        Difference between the largest and the smallest possible value.
    window_size : int, default=11
        Odd side length of the Gaussian window in pixels.
    sigma : float, default=1.5
        Standard deviation of the Gaussian window in pixels.

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
    >>> from skanomaly.losses import ssim_loss
    >>> image = torch.rand(1, 3, 16, 16)
    >>> abs(ssim_loss(image, image).item()) < 1e-6
    True
    """
    return (
        1
        - ssim_map(
            images,
            references,
            data_range=data_range,
            window_size=window_size,
            sigma=sigma,
        ).mean()
    )


@full_precision
def gms_map(images, references, *, constant=0.0026):
    """Compute the gradient magnitude similarity of two batches of images.

    Parameters
    ----------
    images, references : torch.Tensor of shape (b, c, h, w)
        Images with values in [0, 1], compared channel by channel.
    constant : float, default=0.0026
        Keeps the quotient stable where both gradients vanish; made for a range of 1.

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
    >>> from skanomaly.losses import gms_map
    >>> image = torch.rand(1, 3, 8, 8)
    >>> torch.allclose(gms_map(image, image + 0.1), torch.ones(1, 3, 8, 8))
    True
    """
    x, y = _gradient_magnitude(images), _gradient_magnitude(references)
    return (2 * x * y + constant) / (x**2 + y**2 + constant)


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

    References
    ----------
    V. Zavrtanik, M. Kristan, D. Skočaj. "Reconstruction by inpainting for visual
    anomaly detection". Pattern Recognition, 2021.

    Examples
    --------
    >>> import torch
    >>> from skanomaly.losses import msgms_loss
    >>> image = torch.rand(1, 3, 32, 32)
    >>> abs(msgms_loss(image, image).item()) < 1e-6
    True
    """
    loss = 1 - gms_map(images, references).mean()
    for _ in range(n_scales - 1):
        images, references = F.avg_pool2d(images, 2), F.avg_pool2d(references, 2)
        loss = loss + 1 - gms_map(images, references).mean()
    return loss / n_scales


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
    >>> from skanomaly.losses import focal_loss
    >>> logits = torch.zeros(1, 2, 4, 4)
    >>> targets = torch.ones(1, 4, 4, dtype=torch.int64)
    >>> round(focal_loss(logits, targets).item(), 4)
    0.1733
    """
    log_p = F.log_softmax(logits, dim=1).gather(1, targets[:, None])
    return -((1 - log_p.exp()) ** gamma * log_p).mean()
