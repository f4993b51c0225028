"""What docs/ says of PyTorch: its blocks that need it, and the mistakes of a U-Net that chapter 13 prices.

Whoever has only the package cannot run such a block, so it is fenced as text; it opens with "# PyTorch".
"""

import numpy as np
import pytest
from test_docs import PAGES

import tinydiff as td

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.oracle

WITH_PYTORCH = [page for page in PAGES if any(block.text.startswith("# PyTorch") for block in page.blocks)]


def run(page):
    """The names that the page's blocks leave, those with PyTorch among them."""
    namespace = {"__name__": "__main__"}
    for block in page.blocks:
        if block.language == "python" or block.text.startswith("# PyTorch"):
            exec(compile("\n" * block.line + block.text, page.name, "exec", dont_inherit=True), namespace)
    return namespace


@pytest.mark.parametrize("page", WITH_PYTORCH, ids=lambda page: page.path.name)
def test_blocks_with_pytorch_run(page):
    run(page)


def test_a_unet_with_a_mistake_is_off_by_what_chapter_13_says():
    (page,) = (page for page in WITH_PYTORCH if page.path.name == "13-your-own-code.md")
    names = run(page)
    yours, x, y, t = (names[name] for name in ("yours", "x", "y", "t"))
    off, first, last = (names[name] for name in ("off", "first", "last"))

    def seen(x_first, t, of=slice(None)):
        with torch.no_grad():
            return off(last(yours(x_first, torch.as_tensor(t)).sample)[of], y[of])

    assert isinstance(names["pictures"], torch.Tensor)
    assert seen(first(x), t, 0) < 1e-14 and seen(first(x), t) == pytest.approx(5e-7, rel=0.5)
    assert seen(torch.from_numpy(x).reshape(4, 3, 16, 16), t) == pytest.approx(1.1, rel=0.1)
    assert seen(first(x), t + 1) == pytest.approx(0.037, rel=0.1)
    for mistake, number in [
        ({"norm_eps": 1e-6}, 3.5e-6),
        ({"flip_sin_to_cos": False}, 0.086),
        ({"downsample_padding": 0}, 1.0),
    ]:
        wrong = td.interop.unet_from_diffusers({**yours.config, **mistake}, yours.state_dict())
        assert off(wrong.predict(x, t)[0], y[0]) == pytest.approx(number, rel=0.1)
    yours.train()
    torch.manual_seed(0)
    assert seen(first(x), t) == pytest.approx(0.16, rel=0.5)


@pytest.mark.filterwarnings("error")
def test_tensors_go_in_and_tensors_come_out():
    """Of the process, the losses, the bound and the exact denoiser, as chapter 13 says; the same numbers."""
    torch.set_warn_always(True)  # not only the first time, which may have been in another test
    diffusion = td.GaussianDiffusion(td.cosine_schedule(20), "v", "learned_range")
    mixture = td.GaussianMixture([0.4, 0.6], [[-1.0, 0.2], [0.5, 0.0]], 0.1)
    x0, noise = np.random.default_rng(0).standard_normal((2, 5, 2))
    t = np.array([0, 1, 7, 12, 19])

    def everything(x0, t, noise):
        x_t = diffusion.q_sample(x0, t, noise)
        output = mixture.denoiser(diffusion)(x_t, t)
        return [
            x_t,
            output,
            *diffusion.q_posterior_mean_variance(x0, x_t, t),
            *diffusion.p_mean_variance(x_t, t, output),
            *td.simple_loss(diffusion, output, x0, t, noise),
            *td.vlb_loss(diffusion, output, x0, t, noise),
            *td.hybrid_loss(diffusion, output, x0, t, noise),
        ]

    try:
        tensors = everything(torch.from_numpy(x0), torch.from_numpy(t), torch.from_numpy(noise))
    finally:
        torch.set_warn_always(False)
    for tensor, array in zip(tensors, everything(x0, t, noise)):
        assert isinstance(tensor, torch.Tensor)
        np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-12, atol=1e-12)
