"""The matrix product of the reference, and the float64 that everything is computed in."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.backend import Tensor

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]


def float64(values: Tensor | npt.NDArray[Any]) -> Float64:
    return np.asarray(values.float32() if isinstance(values, Tensor) else values, np.float64)


def linear(x: npt.NDArray[Any], weight: Tensor, bias: Tensor | None = None) -> Float64:
    """Return x @ weight.T + bias in float64; x [rows, in], weight [out, in] -> [rows, out].

    One matrix-vector product per row: a matrix-matrix product may round a row differently
    depending on how many others there are.
    """
    y: Float64 = np.matmul(float64(weight), float64(x)[:, :, None])[:, :, 0]
    return y if bias is None else y + float64(bias)


def rms_norm(x: Float64, weight: Tensor, eps: float) -> Float64:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    y: Float64 = x / np.sqrt(mean_square + eps) * float64(weight)
    return y
