"""Rounding of the Numba twin's convolution in float32, beside PyTorch's: both against float64.

Larger patches lose digits. How many is a matter of the points that Winograd's polynomials are taken at, and
of how many patches are added up in a row; this test holds both. docs: A.24
"""

import importlib

import numpy as np
import pytest

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch")
pytest.importorskip("numba", reason="needs Numba, the extra `fast`")


def by_torch(x, w, b, dy, dtype):
    """y, dx, dw, db in this precision, in tinydiff's layout."""
    leaves = [torch.tensor(a, dtype=dtype, requires_grad=True) for a in (x, w, b)]
    taps = leaves[1].permute(3, 2, 0, 1)
    y = torch.nn.functional.conv2d(leaves[0].permute(0, 3, 1, 2), taps, leaves[2], padding=1)
    y = y.permute(0, 2, 3, 1)
    y.backward(torch.tensor(dy, dtype=dtype))
    return [y.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]


@pytest.mark.parametrize(
    ("n", "size", "c", "d"),
    [
        (32, 28, 32, 32),
        (4, 28, 32, 32),
        (16, 14, 64, 64),
        (8, 14, 96, 32),
        (32, 7, 64, 64),
        (2, 16, 64, 64),
        (1, 8, 256, 256),
    ],
)
def test_float32_rounding_is_within_four_times_pytorchs(n, size, c, d):
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((n, size, size, k)).astype(np.float32) for k in (c, d))
    x /= 1 + np.exp(-x)  # what comes out of SiLU, whose mean is not 0
    w = (rng.standard_normal((3, 3, c, d)) / (9 * c) ** 0.5).astype(np.float32)
    b = rng.standard_normal(d).astype(np.float32)
    twin = importlib.import_module("tinydiff.kernels.numba")
    ours = [twin.conv2d(x, w, b, 1, (1, 1)), *twin.conv2d_backward(x, w, dy, 1, (1, 1))]
    theirs, exact = (by_torch(x, w, b, dy, dtype) for dtype in (torch.float32, torch.float64))
    for name, a, t, e in zip(("y", "dx", "dw", "db"), ours, theirs, exact):
        error, allowed = (np.linalg.norm(r - e) / np.linalg.norm(e) for r in (a, t))
        assert error <= 4 * allowed, f"{name}: {error:.1e}, PyTorch {allowed:.1e}"
