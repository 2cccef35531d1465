"""The quantizer `hqq`: quantizes a loaded model in place, saves it, and restores what it saved.

transformers' own HQQ integration does not run without a GPU, so layers are replaced here, one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import HQQBackend
from swift_core.errors import RequestError
from swift_core.types import ModelBundle, Sample

from swift_plugin_hqq.config import HqqConfig
from swift_plugin_hqq.folder import METHOD, quant_method, read_header, write_model
from swift_plugin_hqq.layers import HQQLinear, Settings, linear_layers, quantize, replace
from swift_plugin_hqq.skeleton import fill, is_skeleton


class HqqQuantizer:
    """Satisfies `swift_core.types.Quantizer`."""

    def __init__(self, config: HqqConfig) -> None:
        self.config = config
        HQQLinear.set_backend(HQQBackend.PYTORCH)

    def load_kwargs(self, source: str) -> dict[str, Any]:
        """`skeleton=True` for a folder that this quantizer wrote. Raises RequestError for one that another one wrote."""
        method = quant_method(source)
        if method is None:
            return {}
        if method != METHOD:
            raise RequestError(f"model {source} is quantized by {method} already; hqq needs the original weights")
        read_header(Path(source))
        return {"skeleton": True}

    def apply(self, bundle: ModelBundle, source: str, calibration: Iterable[Sample] | None = None) -> ModelBundle:
        """Quantize the linear layers of a loaded model in place, or fill a skeleton from `source`, its folder.

        A restored model has the settings and the dtype that it was saved with, whatever the options say. `calibration`
        is not read: HQQ needs no data. Raises RequestError for layers that cannot be quantized and for damaged folders.
        """
        model = bundle.model
        if is_skeleton(model):
            fill(model, Path(source), read_header(Path(source)), self._device(None))
        else:
            settings = Settings(self.config.bits, self.config.group_size, self.config.axis, tuple(self.config.skip))
            device = self._device(next(model.parameters()).device)
            for name, layer in linear_layers(model, settings).items():
                replace(model, name, quantize(layer, settings, device))
            model.to(device)
        bundle.quantization = METHOD
        return bundle

    def save(self, bundle: ModelBundle, folder: Path) -> None:
        """Write the quantized model as a folder that `swift-core` loads again. Raises RequestError for any other model."""
        folder = Path(folder)
        if folder.exists() and Path(bundle.source).exists() and folder.samefile(bundle.source):
            raise RequestError(f"{folder} holds the model that was loaded; save the quantized one in another folder")
        write_model(bundle.model, bundle.processor, folder, self.config.shard_size)

    def _device(self, loaded: torch.device | None) -> torch.device:
        """Where to quantize: as the options say, else where the model was loaded, else the GPU if there is one."""
        if self.config.device != "auto":
            if self.config.device.startswith("cuda") and not torch.cuda.is_available():
                raise RequestError(f"quantizer.hqq.device: {self.config.device} was asked for, and torch finds no GPU here")
            return torch.device(self.config.device)
        return loaded or torch.device("cuda" if torch.cuda.is_available() else "cpu")
