"""A network that is told a class (chapter 7), guided as chapter 6 says, draws what is asked for."""

import numpy as np
import pytest
from test_docs import PAGES

import tinydiff as td
from tinydiff.datasets import mnist
from tinydiff.metrics import digit_probabilities

NONE, STEPS, BATCH = 10, 600, 64


def of_classes():
    """Chapter 7's class of networks."""
    (page,) = (page for page in PAGES if page.path.name == "07-backpropagation.md")
    (block,) = (block for block in page.blocks if "class OfClasses" in block.text)
    names = {"np": np, "sinusoidal_embedding": td.nn.sinusoidal_embedding}
    exec(block.text.partition("\n\n\nunet = ")[0], names)
    return names["OfClasses"]


def trained(diffusion, images, labels, rng):
    unet = td.UNet(block_channels=(32, 64), attention=(False, True), rng=rng)
    net = of_classes()(unet, NONE, rng)
    parameters = net.named_parameters()
    optimizer, average = td.Adam(parameters), td.EMA(net, 0.99)
    for step in range(STEPS):
        picked = rng.integers(len(images), size=BATCH)
        y = np.where(rng.random(BATCH) < 0.15, NONE, labels[picked])
        _, backward = td.training_loss(lambda x, t, _: net(x, t, y), diffusion, images[picked], rng)  # noqa: B023
        optimizer.zero_grad()
        backward()
        td.clip_grad_norm(parameters, 1.0)
        optimizer.lr = 2e-3 * td.warmup_cosine(step, STEPS, 50)
        optimizer.step()
        average.update()
    return average.model


@pytest.mark.slow
def test_a_network_told_a_digit_draws_it():
    """Of 14 x 14 pixels, each the mean of four."""
    rng = np.random.default_rng(0)
    images, labels = mnist.load("train")
    small = mnist.to_model_range(images).reshape(-1, 14, 2, 14, 2, 1).mean((2, 4))
    diffusion = td.GaussianDiffusion(td.cosine_schedule(), "v")
    asked = np.arange(200) % 10

    def right(w):
        def guided(x, t):
            none, told = (net.predict(x, t, y) for y in (np.full(200, NONE), asked))
            return none + w * (told - none)

        x = td.sample(guided, diffusion, (200, 14, 14, 1), "ddim", 25, rng=rng, clip=True, progress=False)
        large = x.repeat(2, axis=1).repeat(2, axis=2)
        return np.mean(np.argmax(digit_probabilities(large), axis=1) == asked)

    with td.kernels.many_steps():
        net = trained(diffusion, small.astype(np.float32), labels.astype(int), rng)
        found = right(1.0), right(3.0)
    assert found[0] > 0.6 and found[1] > 0.95
