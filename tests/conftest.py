"""Fixtures shared by all tests: no network, one thread, and the real model where it is at hand."""

from __future__ import annotations

import os

# Set before any test imports torch or transformers: no test may reach for the network, and the
# workers of pytest-xdist must not fight over the cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Keep torch to one thread per worker."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_state() -> None:
    """Start every test from the same random state, so that a failure can be repeated alone."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="module", params=("sd", "sd3", "flux"))
def pipe(request: pytest.FixtureRequest) -> Any:
    """Return a tiny pipeline of each layout that the diffusion door reaches."""
    from regard.zoo.tiny_diffusion import tiny_pipeline

    return tiny_pipeline(request.param)


@pytest.fixture(scope="module")
def sd() -> Any:
    """Return a tiny `StableDiffusionPipeline`."""
    from regard.zoo.tiny_diffusion import tiny_pipeline

    return tiny_pipeline("sd")


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """Return the real SmolLM2-135M-Instruct and its tokenizer, or skip with the reason."""
    from regard import zoo
    from regard.errors import RegardError

    try:
        return zoo.load("smollm2-135m")
    except RegardError as problem:
        pytest.skip(f"the real SmolLM2 weights are not at hand: {problem}")
