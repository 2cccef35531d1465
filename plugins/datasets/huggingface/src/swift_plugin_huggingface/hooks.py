"""Answers the kernel for the data set `huggingface`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swift_core import hookimpl

from swift_plugin_huggingface.config import HuggingFaceConfig

if TYPE_CHECKING:
    from swift_core.types import Dataset


@hookimpl
def swift_open_dataset(dataset_id: str, config: HuggingFaceConfig) -> Dataset | None:
    if dataset_id != "huggingface":
        return None
    from swift_plugin_huggingface.dataset import open_dataset

    return open_dataset(config)
