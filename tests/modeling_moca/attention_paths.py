"""Which attention paths run here: every one is tried, not looked up, and a path that does not run says why."""

import functools
from dataclasses import dataclass

import pytest
import torch

PATHS = ("eager", "sdpa", "flex_attention", "flash_attention_2")


@dataclass(frozen=True)
class Setup:
    """An attention path, where it runs and in which type.

    Embeddings of two paths may differ by `tolerance`: 1e-5 in float32, 2e-2 in bfloat16.
    """

    path: str
    device: str
    dtype: torch.dtype

    @property
    def tolerance(self):
        return 1e-5 if self.dtype == torch.float32 else 2e-2

    def __str__(self):
        return f"{self.path}-{self.device}-{str(self.dtype).removeprefix('torch.')}"


@functools.cache
def why_not(path, device, dtype):
    """Return why a path (`str`) does not run on a device (`str`) in a dtype, as one sentence; None if it runs."""
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    if path == "flash_attention_2":
        return _why_not_flash(device, dtype)
    if path == "flex_attention":
        return _why_not_flex(device, dtype)
    return None


def _why_not_flash(device, dtype):
    if device != "cuda" or dtype == torch.float32:
        return f"flash-attn computes on CUDA devices and in half precision only, not on {device} in {dtype}"
    try:
        from flash_attn import flash_attn_func

        states = torch.randn(1, 16, 2, 32, device=device, dtype=dtype)
        flash_attn_func(states, states, states)
    # A build for another torch or another GPU fails in ways of its own.
    except Exception as error:
        return f"flash-attn does not run here: {type(error).__name__}: {error}".splitlines()[0]
    return None


def _why_not_flex(device, dtype):
    try:
        from torch.nn.attention.flex_attention import flex_attention

        states = torch.randn(1, 2, 16, 16, device=device, dtype=dtype)
        with torch.no_grad():
            torch.compile(flex_attention)(states, states, states)
    # Without a compiler, or on other processors, inductor raises what it likes.
    except Exception as error:
        return f"torch.compile does not build flex attention here: {type(error).__name__}: {error}".splitlines()[0]
    return None


def has_backward(setup):
    """Tell whether gradients flow on this path: flex attention has no backward pass on CPU."""
    return setup.path != "flex_attention" or setup.device != "cpu"


def setups(dtypes=(torch.float32,), paths=PATHS):
    """Return every path on every device in these types as pytest parameters; those that do not run are skipped."""
    parameters = []
    for device in ("cpu", "cuda"):
        for path in paths:
            for dtype in dtypes:
                setup = Setup(path, device, dtype)
                reason = why_not(path, device, dtype)
                marks = [pytest.mark.skip(reason=f"{setup}: {reason}")] if reason else []
                parameters.append(pytest.param(setup, id=str(setup), marks=marks))
    return parameters
