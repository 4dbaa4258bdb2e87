"""The CUDA kernels compiled for the CPU, for the tests that call them."""

import pytest


@pytest.fixture(params=["forward", "reverse"])
def kernels(request, monkeypatch):
    """The operators; the threads of a block run first to last, then last to first."""
    from ..support.cuda_calls import built

    monkeypatch.setenv("CUDA_SHIM_ORDER", request.param)
    return built()
