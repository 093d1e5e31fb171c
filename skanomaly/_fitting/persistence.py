"""How fitted estimators with networks go into files and come back."""

import copy
import warnings
import zlib
from numbers import Real

import numpy as np
import sklearn
import torch

from .. import version


class PersistentNetwork:
    """Mixin of estimators that may hold a ``network_``.

    In a file the network is a dictionary of NumPy arrays, so that joblib and skops can
    store it like any other and ``joblib.load(mmap_mode="r")`` can share it between
    processes. The estimator writes ``_build_network()``, and its fit notes in
    ``_built_from`` the parameters that this reads.
    """

    def __getstate__(self):
        state = super().__getstate__()
        if "network_" in state:
            state = {**state, "network_": network_to_arrays(state["network_"])}
            state.pop("_has_shared_weights", None)
        if not any(name.endswith("_") for name in state):
            return state
        return {
            **state,
            "_saved_by": _versions(),
            "_checksum": _checksum(state),
        }

    def __setstate__(self, state):
        state = dict(state)
        saved_by, checksum = state.pop("_saved_by", {}), state.pop("_checksum", None)
        arrays = list(_arrays(state))
        is_mapped = any(isinstance(array, np.memmap) for _, array in arrays)
        if checksum is not None and not is_mapped and checksum != _checksum(state):
            raise ValueError(
                f"The file of this {type(self).__name__} is damaged: its arrays are "
                "not those that were saved."
            )
        changes = [
            f"{package} {version} (now {_versions()[package]})"
            for package, version in saved_by.items()
            if version != _versions()[package]
        ]
        if changes:
            warnings.warn(
                f"{type(self).__name__} was saved with {', '.join(changes)}. Scores "
                "may differ; fit again if they do.",
                stacklevel=3,
            )
        super().__setstate__(state)
        if "network_" in state:
            self._restore_network(state["network_"])

    def _restore_network(self, arrays):
        fitted = object.__new__(type(self))
        fitted.__dict__.update({**vars(self), **self._built_from})
        with torch.device("meta"):
            network = fitted._build_network()
        tensors = {name: _to_tensor(array) for name, array in arrays.items()}
        network.load_state_dict(tensors, assign=True)
        self.network_ = channels_last(network).eval()
        if not all(array.flags.writeable for array in arrays.values()):
            self._has_shared_weights = True

    def _own_weights(self):
        """Copy the weights, before they are trained, if they are mapped from a file."""
        if self.__dict__.pop("_has_shared_weights", False):
            self.network_ = copy.deepcopy(self.network_)


def _versions():
    return {
        "skanomaly": version.__version__,
        "torch": torch.__version__.partition("+")[0],
        "scikit-learn": sklearn.__version__,
    }


def _arrays(state, path=()):
    """Yield the places and the numerical arrays in nested dictionaries, in order."""
    for name in sorted(state, key=str):
        value = state[name]
        if isinstance(value, dict):
            yield from _arrays(value, (*path, name))
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            yield (*path, name), value


def _checksum(state):
    checksum = 0
    for path, array in _arrays(state):
        checksum = zlib.crc32(repr((path, array.shape)).encode(), checksum)
        checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
    return checksum


def network_to_arrays(network):
    """Return the parameters and buffers of a network as NumPy arrays by name.

    Parameters
    ----------
    network : torch.nn.Module
        A network on any device.

    Returns
    -------
    dict of str to numpy.ndarray
        Its state. The kernels of convolutions have their input channels last, as they
        lie in memory.
    """
    return {
        name: (tensor.movedim(1, -1) if tensor.ndim > 3 else tensor)
        .detach()
        .cpu()
        .contiguous()
        .numpy()
        for name, tensor in network.state_dict().items()
    }


def shared_tensor(array):
    """Return a tensor that is only read, of an array that may be mapped from a file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(array)


def _to_tensor(array):
    tensor = shared_tensor(array)
    return tensor.movedim(-1, 1) if tensor.ndim > 3 else tensor


def plain_parameters(estimator):
    """Return the parameters of an estimator that are numbers, strings or tuples.

    Parameters
    ----------
    estimator : BaseEstimator
        An estimator in its fit.

    Returns
    -------
    dict
        What its network is built from, even if ``set_params`` changes it afterwards.
    """
    return {
        name: value
        for name, value in estimator.get_params(deep=False).items()
        if isinstance(value, (Real, str, tuple, list, type(None)))
    }


def channels_last(network):
    """Store the weights of a network's convolutions channels last, the fast layout.

    Parameters
    ----------
    network : torch.nn.Module
        A network whose convolutions all have two axes, or all three.

    Returns
    -------
    torch.nn.Module
        The network.
    """
    n_axes = max((parameter.ndim for parameter in network.parameters()), default=0)
    if n_axes == 5:
        return network.to(memory_format=torch.channels_last_3d)
    return network.to(memory_format=torch.channels_last)
