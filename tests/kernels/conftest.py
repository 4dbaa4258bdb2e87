"""The CUDA kernels compiled for the CPU, as a fixture."""

import pytest


@pytest.fixture(params=["forward", "reverse"])
def kernels(request, monkeypatch):
    """The operators, with a block's threads run first to last, then last to first."""
    from ..support.cuda_calls import built

    monkeypatch.setenv("CUDA_SHIM_ORDER", request.param)
    return built()
