"""Small packed data sets and models for the tests of measuring."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.shards import pack
from pipeline.data.sources import load
from pipeline.model.naign import NAIGN
from pipeline.model.networks import NetworkConfig, build_network


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """scikit-learn's 8x8 digits, packed."""
    folder = str(tmp_path_factory.mktemp("digits"))
    pack(load("digits"), folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def save_untrained() -> Callable[..., str]:
    """Writes a model as training would export it, weights still random, and returns its folder."""

    def save(
        folder: Path,
        *,
        data: str | None,
        shape: tuple[int, ...],
        config: NetworkConfig,
        dataset: str | None = None,
        encoder: str | None = None,
    ) -> str:
        torch.manual_seed(0)
        metadata: dict[str, Any] = {"shape": list(shape), "latents": "gaussian", "model": dataclasses.asdict(config)}
        metadata |= {"seed": 7, "images_seen": 12_345, "config": {"data": {"path": data}} if data else {}}
        metadata |= {"dataset": dataset} if dataset else {}
        metadata["config"] |= {"objective": {"encoder": encoder}} if encoder else {}
        NAIGN(build_network(config, shape), metadata).save_pretrained(folder)
        return str(folder)

    return save
