"""``torch.compiler.disable`` as a decorator that keeps the type of a function, which PyTorch's own annotation loses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    Function = TypeVar("Function", bound=Callable[..., Any])

    def uncompiled(function: Function) -> Function: ...

else:
    uncompiled = torch.compiler.disable
