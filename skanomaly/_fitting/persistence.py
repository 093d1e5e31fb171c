"""How fitted estimators with networks go into files and come back."""

import copy
import warnings
import zlib
from numbers import Real

import numpy as np
import sklearn
import torch

from .. import version

# of a fit, but of no use in another process
NOT_IN_FILES = ("_optimizers", "_has_shared_weights")


def forget(estimator, *names):
    """Remove attributes of an estimator, as far as it has them."""
    for name in names:
        vars(estimator).pop(name, None)


def fitted_state(estimator):
    """Return what a fit has found so far, as it goes into files.

    Parameters
    ----------
    estimator : PersistentNetwork
        An estimator in its fit.

    Returns
    -------
    dict
        Its fitted attributes by name.
    """
    return {
        name: value
        for name, value in estimator.__getstate__().items()
        if name in estimator._kept_names or name.endswith("_")
    }


def put_back(estimator, state):
    """Give an estimator what `fitted_state` has returned."""
    forget(estimator, *NOT_IN_FILES)
    vars(estimator).update(state)
    estimator._restore_network(state["network_"])


class PersistentNetwork:
    """Mixin of estimators that may hold a ``network_``.

    In a file the network is a dictionary of NumPy arrays, so that joblib and skops can
    store it like any other and ``joblib.load(mmap_mode="r")`` can share it between
    processes. The estimator writes ``_build_network()``, and its fit notes in
    ``_built_from`` the parameters that this reads.
    """

    # private attributes that a training needs to go on
    _kept_names: tuple[str, ...] = ("_seed", "_built_from")

    def __getstate__(self):
        state = {
            name: value
            for name, value in super().__getstate__().items()
            if name not in NOT_IN_FILES
        }
        if "network_" in state:
            state["network_"] = network_to_arrays(state["network_"])
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
        # parameters may have been set since the fit
        fitted = object.__new__(type(self))
        vars(fitted).update({**vars(self), **self._built_from})
        with torch.device("meta"):
            network = fitted._build_network()
        tensors = {name: _to_tensor(array) for name, array in arrays.items()}
        network.load_state_dict(tensors, assign=True)
        self.network_ = channels_last(network).eval()
        if not all(array.flags.writeable for array in arrays.values()):
            self._has_shared_weights = True

    def _own_weights(self):
        """Copy the weights, before they are trained, if they are mapped from a file."""
        if getattr(self, "_has_shared_weights", False):
            self.network_ = copy.deepcopy(self.network_)
            forget(self, "_has_shared_weights")


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
    # places and shapes count, too: arrays that changed places would go unnoticed
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


def check_architecture(estimator):
    """Raise if the network of the last fit is not one of the parameters.

    Parameters
    ----------
    estimator : PersistentNetwork
        An estimator whose next fit goes on with its network.

    Raises
    ------
    ValueError
        If parameters were set that make another network.
    """
    with torch.device("meta"):
        wanted = estimator._build_network().state_dict()
    shapes = [
        {name: tensor.shape for name, tensor in state.items()}
        for state in (estimator.network_.state_dict(), wanted)
    ]
    if shapes[0] == shapes[1]:
        return
    built_from = estimator._built_from
    changes = ", ".join(
        f"{name}={value!r} (was {built_from[name]!r})"
        for name, value in plain_parameters(estimator).items()
        if value != built_from.get(name, value)
    )
    raise ValueError(
        "With warm_start=True a fit goes on with the network of the last one, "
        f"which these parameters do not describe: {changes}. Set them back, or "
        "warm_start to False."
    )


class _Writable:
    """Looks to NumPy like an array that it may write to."""

    def __init__(self, array):
        self.array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {
            **array.__array_interface__,
            "data": (address, False),
        }


def shared_tensor(array):
    """Return a tensor that is only read, of an array that may be mapped from a file.

    torch warns of arrays that it must not write to. To silence a warning is no way out,
    since that is done for all threads at once.
    """
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))
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
