"""How fitted estimators with networks go into files and come back."""

import contextlib
import copy
import os
import warnings
import zlib
from numbers import Integral, Real

import numpy as np
import sklearn
import torch
from sklearn.base import BaseEstimator
from torch import nn
from torch.overrides import TorchFunctionMode

from .. import version

# of a fit, but of no use in another process
NOT_IN_FILES = ("_optimizers", "_has_shared_weights")
# parameters that change no result but by rounding
HOW_TO_COMPUTE = ("batch_size", "device", "memory", "precision", "verbose")
# what gives a new network values and no shapes: draws, and spectral norms' iterations
FILLING = {
    nn.functional.normalize,
    nn.init.kaiming_normal_,
    nn.init.kaiming_uniform_,
    nn.init.normal_,
    nn.init.uniform_,
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
}


class Unfilled(TorchFunctionMode):
    """Builds networks in a ``with`` block without initial weights, to be loaded."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call a function of torch, unless it fills a tensor."""
        kwargs = kwargs or {}
        if func in FILLING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_data():
    """Build the networks of a ``with`` block to look at them, or to load them."""
    with torch.device("meta"), Unfilled():
        yield


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


def _copy_with(estimator, attributes):
    copied = object.__new__(type(estimator))
    vars(copied).update({**vars(estimator), **attributes})
    return copied


def is_other(value, known):
    """Return whether a parameter is another one than a plain value that is known."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        differs = value != known
        if isinstance(differs, (bool, np.bool_)):
            return bool(differs)
    return True  # the comparison of an array is one, or fails


def as_fitted(estimator):
    """Return an estimator with the parameters that it predicts with.

    Parameters
    ----------
    estimator : PersistentNetwork
        A fitted estimator, whose parameters may have been set since.

    Returns
    -------
    PersistentNetwork
        The estimator itself, or a copy with the parameters of its fit but for those
        that prediction may take as they are now.

    Raises
    ------
    ValueError
        If a parameter was set to what fit would refuse.
    """
    built_from = estimator._built_from
    changed = [
        name
        for name, known in built_from.items()
        if (value := getattr(estimator, name)) is not known and is_other(value, known)
    ]
    if not changed:
        return estimator
    estimator._validate_params()
    taken = (*HOW_TO_COMPUTE, *estimator._judged_by)
    fitted = _copy_with(
        estimator, {name: built_from[name] for name in changed if name not in taken}
    )
    if not set(changed) <= set(HOW_TO_COMPUTE):
        fitted._check_settings()
    return fitted


@contextlib.contextmanager
def unchanged_if_refused(estimator):
    """Let an estimator be what it was, if a ``with`` block raises.

    Parameters
    ----------
    estimator : BaseEstimator
        The estimator.
    """
    before = dict(vars(estimator))
    try:
        yield
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise


class PersistentNetwork:
    """Mixin of estimators that may hold a ``network_``.

    In a file the network is a dictionary of NumPy arrays, so that joblib and skops can
    store it like any other and ``joblib.load(mmap_mode="r")`` can share it between
    processes. The estimator writes ``_build_network()``, and its fit notes in
    ``_built_from`` the parameters that this reads.
    """

    # parameters that are taken as they are now; beside what says how to compute, all
    # others are those of the fit
    _judged_by: tuple[str, ...] = ()
    # private attributes that a fit leaves
    _kept_names: tuple[str, ...] = (
        "_seed",
        "_built_from",
        "_value_range",
        "_training_degrees",
        "_training_peaks",
    )

    def _check_settings(self):
        """Raise if parameters do not fit each other or the images."""

    def _validate_params(self):
        super()._validate_params()
        _check_numbers(self)

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
        self._refuse_foreign(state)
        if checksum is not None and not _agree(checksum, _checksum(state)):
            raise ValueError(
                f"The file of this {type(self).__name__} is damaged: what it holds is "
                "not what was saved."
            )
        if missing := sorted(set(self._get_param_names()) - set(state)):
            raise ValueError(
                f"The file of this {type(self).__name__} has no {', '.join(missing)}: "
                "it was saved before there were such parameters. Fit again."
            )
        changes = [
            f"{package} {version} (now {_versions().get(package)})"
            for package, version in saved_by.items()
            if version != _versions().get(package)
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

    def _refuse_foreign(self, state):
        """Raise if an attribute would take the place of a method, or can be called.

        Other names do no harm: they may be a user's notes.
        """
        known = {*self._get_param_names(), *self._kept_names}
        for name, value in state.items():
            is_shadow = name not in known and hasattr(type(self), name)
            if is_shadow or name.startswith("__") or callable(value):
                raise ValueError(
                    f"The file of this {type(self).__name__} holds {name!r}, which is "
                    "not of its making and could be called: do not use it."
                )

    def _restore_network(self, arrays):
        # parameters may have been set since the fit
        with without_data():
            network = _copy_with(self, self._built_from)._build_network()
        tensors = {name: _to_tensor(array) for name, array in arrays.items()}
        network.load_state_dict(tensors, assign=True)
        self.network_ = channels_last(network).eval()
        if any(is_mapped(array) for array in arrays.values()):
            self._has_shared_weights = True

    def _own_weights(self):
        """Copy the weights, before they are trained, if they are mapped from a file."""
        if getattr(self, "_has_shared_weights", False):
            self.network_ = copy.deepcopy(self.network_)
            forget(self, "_has_shared_weights")


def _check_numbers(estimator):
    """Raise if numbers among the parameters are of a kind that is not computed with.

    Of them scikit-learn's constraints let through what Python calls a number.
    """
    for name, value in estimator.get_params(deep=False).items():
        problem = None
        if isinstance(value, (float, np.floating)) and not np.isfinite(value):
            problem = "must be finite"
        elif isinstance(value, np.integer) and value.dtype.itemsize < 4:
            problem = f"may overflow in what is computed of it: int({name})"
        elif (
            isinstance(value, (bool, np.bool_))
            and not {"boolean", bool}
            & set(estimator._parameter_constraints.get(name, [bool]))
            and name != "verbose"
        ):
            problem = "must be a number, not a boolean"
        if problem is not None:
            raise ValueError(
                f"{name}={value!r} of {type(estimator).__name__} {problem}."
            )


def _versions():
    return {
        "skanomaly": version.__version__,
        "torch": torch.__version__.partition("+")[0],
        "scikit-learn": sklearn.__version__,
    }


def _leaves(value, path=()):
    """Yield the places of what nested containers hold, and what is there, in order."""
    if isinstance(value, dict):
        for name in sorted(value, key=str):
            yield from _leaves(value[name], (*path, name))
    elif isinstance(value, (list, tuple)):
        yield path, len(value)
        for number, item in enumerate(value):
            yield from _leaves(item, (*path, number))
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        yield from _leaves(value.tolist(), path)
    elif isinstance(value, PersistentNetwork):
        # what it has learned has a checksum of its own
        yield from _leaves(value.get_params(deep=False), path)
    elif isinstance(value, BaseEstimator) or type(value).__module__.startswith(
        f"{__name__.partition('.')[0]}."
    ):
        yield from _leaves(vars(value), path)
    else:
        yield path, value


def is_mapped(array):
    """Return whether an array lies in a file, or may not be written to."""
    return isinstance(array, np.memmap) or not array.flags.writeable


def _checksum(state):
    """Return checksums of arrays, None if they are mapped from a file, and of all else.

    What is mapped is not to be read at once.
    """
    of_arrays, of_others, is_mapped = 0, 0, False
    # places and shapes count, too: arrays that changed places would go unnoticed
    for path, value in _leaves(state):
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            place = repr((path, value.shape, value.dtype.str))
            of_others = zlib.crc32(place.encode(), of_others)
            if isinstance(value, np.memmap):
                is_mapped = True
            else:
                data = np.ascontiguousarray(value).view(np.uint8).data
                of_arrays = zlib.crc32(data, of_arrays)
        else:
            of_others = zlib.crc32(repr((path, _plain(value))).encode(), of_others)
    return None if is_mapped else of_arrays, of_others


def _plain(value):
    """Return what tells two values apart, in this process and in the next."""
    if isinstance(value, (float, np.floating)):
        return float(value).hex()
    if isinstance(value, (bool, np.bool_, str, type(None), os.PathLike)):
        return str(value)
    return int(value) if isinstance(value, Integral) else type(value).__name__


def _agree(saved, found):
    return found[0] in (None, saved[0]) and found[1] == saved[1]


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
    with without_data():
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
    """Return the parameters of an estimator that are numbers, texts, paths or tuples.

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
        if isinstance(value, (Real, str, os.PathLike, tuple, list, type(None)))
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
