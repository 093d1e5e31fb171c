"""Detectors that score an image as their paper does, or by the maximum of its map."""

from abc import abstractmethod
from numbers import Integral

from sklearn.utils._param_validation import Interval, StrOptions

from ._fitting.persistence import forget, shared_tensor
from ._tensors.filters import mean_filter, scaled_size
from .base import NetworkDetector


class MapScoredDetector(NetworkDetector):
    """Base of detectors whose paper scores images by other than the smoothed maximum.

    A method writes ``_raw(images, generator)``, which returns the degrees (b,) of the
    paper and maps (b, ..., h, w), and lists its own words for ``image_score`` beside
    "max" in ``_parameter_constraints``.
    """

    _parameter_constraints = {
        **NetworkDetector._parameter_constraints,
        "smoothing_size": [Interval(Integral, 1, None, closed="left")],
        "reference": [StrOptions({"training", "none"})],
    }

    _judged_by = ("image_score", "smoothing_size")

    @abstractmethod
    def _raw(self, images, generator):
        """Return degrees of anomaly (b,) as the paper has them, and raw maps."""

    def _survey(self, images):
        forget(self, "mean_map_")
        if self.reference == "none":
            return
        total = 0.0
        for _, (_, maps) in self._in_batches(images, self._raw):
            total = total + maps.sum(dim=0)
        self.mean_map_ = (total / len(images)).float().cpu().numpy()

    def _judge(self, images, *, maps_wanted, generator):
        return self._rated(*self._raw(images, generator), maps_wanted=maps_wanted)

    def _rated(self, degrees, maps, *, maps_wanted):
        """Return the degrees asked for, and maps as they leave, of raw ones."""
        by_map = self.image_score == "max"
        if not (by_map or maps_wanted):
            return degrees, None
        if self.reference == "training":
            maps = maps - shared_tensor(self.mean_map_).to(maps.device)
        size = scaled_size(self.smoothing_size, maps)
        maps = mean_filter(maps.flatten(0, -3), size, padding="none").view(maps.shape)
        return maps.flatten(1).amax(dim=1) if by_map else degrees, maps
