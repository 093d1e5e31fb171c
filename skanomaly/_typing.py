"""Types that annotations share, and scikit-learn's decorators with types of their own.

scikit-learn has no annotations: what its decorators return would be `Any` to a type
checker, and with it the result of every `fit`.
"""

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from numpy.typing import ArrayLike
from sklearn import base
from sklearn.utils import _param_validation, metaestimators

if TYPE_CHECKING:
    from typing_extensions import Self
else:
    Self = "Self"  # typing has it from Python 3.11 on

StrPath = str | os.PathLike[str]
ImagesOrPaths = ArrayLike | Iterable[StrPath]

Function = TypeVar("Function", bound=Callable[..., Any])

available_if: Callable[..., Callable[[Function], Function]]
available_if = metaestimators.available_if
fit_context: Callable[..., Callable[[Function], Function]]
fit_context = base._fit_context
validate_params: Callable[..., Callable[[Function], Function]]
validate_params = _param_validation.validate_params
