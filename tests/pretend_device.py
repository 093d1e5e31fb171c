"""A GPU without a GPU: tensors that say they are on CUDA and do not mix with others.

They hold their numbers in ordinary memory, so that everything runs for real, data-
dependent shapes and draws included. What CUDA would refuse is refused: operations on
tensors of two devices, but for single numbers, copies and indices, and NumPy's hands on
a tensor that was not brought back.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
# these take a copy of one device to another, or rows by indices of the host
CROSSING = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
INDEXING |= {aten._index_put_impl_.default}


class PretendTensor(torch.Tensor):
    """A tensor that says that it is on the device."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=held.device,
            requires_grad=held.requires_grad,
        )

    def __init__(self, held):
        self.held = held

    @property
    def device(self):
        """Where it says it is."""
        return DEVICE

    @property
    def is_cuda(self):
        """Whether it is on CUDA."""
        return True

    def __repr__(self):
        return f"PretendTensor({self.held!r})"

    def numpy(self, *args, **kwargs):
        """Refuse, as a tensor on CUDA does."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def is_pretended(value):
    return isinstance(value, PretendTensor)


def run(function, args, kwargs):
    """Run an operation where its arguments are, or raise."""
    tensors = [
        t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)
    ]
    if function in INDEXING:
        tensors = [t for t in (args[0], *args[2:3]) if isinstance(t, torch.Tensor)]
    crowd = {is_pretended(t) for t in tensors if t.ndim}
    # zeros that autograd makes on the way back do not know of the pretence
    is_way_back = torch._C._current_graph_task_id() != -1
    if len(crowd) > 1 and function not in CROSSING and not is_way_back:
        raise RuntimeError(f"{function}: tensors of cuda:0 and of the CPU are mixed")
    on_device = any(map(is_pretended, tensors))
    if function is aten.copy_.default:
        on_device = is_pretended(args[0])
    if "generator" in kwargs and kwargs["generator"] is not None and on_device:
        raise RuntimeError("a generator of the CPU draws for a tensor on cuda:0")
    held_args, held_kwargs = tree_map(
        lambda t: t.held if is_pretended(t) else t, (args, kwargs)
    )
    held = function(*held_args, **held_kwargs)
    known = {id(t.held): t for t in tensors if is_pretended(t)}

    def wrap(value):
        if not isinstance(value, torch.Tensor) or not on_device:
            return value
        own = known.get(id(value))  # of an operation in place
        # the view of a tensor from before an inference is no inference tensor
        with torch.inference_mode(value.is_inference()):
            return PretendTensor(value) if own is None else own

    return tree_map(wrap, held)


def asks_for_device(value):
    """Return whether an argument names CUDA."""
    if isinstance(value, (str, torch.device)):
        return torch.device(value).type == DEVICE.type
    return False


def is_leaving(function, args, kwargs):
    """Return whether a tensor of the device is brought back."""
    if function not in (torch.Tensor.cpu, torch.Tensor.to) or not is_pretended(args[0]):
        return False
    values = *args[1:], *kwargs.values()
    return function is torch.Tensor.cpu or any(
        torch.device(value).type == "cpu"
        for value in values
        if isinstance(value, (str, torch.device))
    )


class PretendDevice(TorchFunctionMode):
    """Let ``device="cuda"`` give tensors that pretend.

    Torch looks for a driver before an operation gets as far as `run`.
    """

    def __enter__(self):
        # else the parameters of a module that is moved stay what they are
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values = *args[1:], *kwargs.values()
        if function is torch.Tensor.to and any(map(asks_for_device, values)):
            args, kwargs = tree_map(
                lambda value: None if asks_for_device(value) else value, (args, kwargs)
            )
            tensor = function(*args, **kwargs)
            if is_pretended(tensor):
                return tensor
            assert tensor.grad_fn is None, "no gradient crosses devices here"
            return PretendTensor(tensor)
        if function is F.one_hot and is_pretended(args[0]):  # makes a range in C++
            return PretendTensor(function(args[0].held, *args[1:], **kwargs))
        if is_leaving(function, args, kwargs):
            return args[0].held
        if asks_for_device(kwargs.get("device")):
            return PretendTensor(function(*args, **{**kwargs, "device": "cpu"}))
        return function(*args, **kwargs)
