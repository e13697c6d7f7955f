"""Sessions of ONNX Runtime with a chosen number of threads, on a chosen device."""

from __future__ import annotations

import importlib
import os
from typing import Any

from istanas.errors import ConfigError

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def onnx_session(model: bytes | str | os.PathLike[str], threads: int = 1, device: str = "cpu") -> Any:
    """Return a session of ONNX Runtime.

    Args:
        model: The file or its content.
        threads: CPU threads, >= 1.
        device: "cpu" or "cuda".

    Raises:
        ConfigError: If the installed ONNX Runtime does not support the device.
    """
    onnxruntime = importlib.import_module("onnxruntime")  # it has no type annotations
    provider = _PROVIDERS[device]
    if provider not in onnxruntime.get_available_providers():
        raise ConfigError(
            f"the installed ONNX Runtime has no {provider}",
            field="--backend onnxruntime",
            remedy="give --device cpu, or install onnxruntime-gpu",
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(model, options, providers=[provider])
