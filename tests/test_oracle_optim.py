"""The optimiser and the clipping against PyTorch's, over many steps in float64."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

import tinydiff as td
from tinydiff.nn import Parameter

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.oracle

SHAPES = [(5,), (3, 4), (2, 3, 2), ()]
STEPS = 200


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e-3},
        {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3},
        {"lr": 0.05, "betas": (0.0, 0.99), "weight_decay": 0.2},
        {"lr": 2e-4, "betas": (0.9, 0.999), "weight_decay": 0.01},
    ],
)
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_adam_is_torch_s(settings, scale):
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape) for shape in SHAPES]
    ours = [Parameter(np.array(value)) for value in values]
    theirs = [torch.nn.Parameter(torch.tensor(value)) for value in values]
    optimizer = td.Adam({str(i): p for i, p in enumerate(ours)}, **settings)
    torch_class = torch.optim.AdamW if "weight_decay" in settings else torch.optim.Adam
    reference = torch_class(theirs, **settings)
    for step in range(STEPS):
        lr = settings["lr"] * td.warmup_cosine(step, STEPS, 20)
        optimizer.lr = reference.param_groups[0]["lr"] = lr
        for p, q in zip(ours, theirs):
            # every seventh gradient is zero: the moments go on without it
            grad = scale * rng.standard_normal(p.shape) * (step % 7 > 0)
            p.grad, q.grad = np.asarray(grad), torch.as_tensor(grad)
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs):
            assert_allclose(p.value, q.detach().numpy(), rtol=1e-12, atol=1e-12)
    for p, q, m, v in zip(ours, theirs, optimizer.m, optimizer.v):
        state = reference.state[q]
        assert p.shape == tuple(q.shape)
        assert optimizer.steps == int(state["step"])
        assert_allclose(m, state["exp_avg"].numpy(), rtol=1e-11, atol=1e-14 * scale)
        assert_allclose(v, state["exp_avg_sq"].numpy(), rtol=1e-11)


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 5.0, 1e3])
def test_clipping_is_torch_s(max_norm):
    rng = np.random.default_rng(1)
    grads = [rng.standard_normal(shape) for shape in SHAPES]
    ours = [Parameter(np.zeros(shape), np.array(grad)) for shape, grad in zip(SHAPES, grads)]
    theirs = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    for q, grad in zip(theirs, grads):
        q.grad = torch.as_tensor(np.array(grad))
    norm = td.clip_grad_norm(ours, max_norm)
    reference = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert_allclose(norm, reference.numpy(), rtol=1e-14)
    # Where it clips, torch divides by norm + 1e-6, tinydiff by norm + 1e-12.
    clips = max_norm < float(norm)
    correction = (float(norm) + 1e-6) / (float(norm) + 1e-12) if clips else 1.0
    for p, q in zip(ours, theirs):
        assert_allclose(p.grad, q.grad.numpy() * correction, rtol=1e-13)
