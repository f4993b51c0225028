"""Progress bars: on the standard error stream, if it is wanted and there."""

import os
import sys
from contextlib import suppress

import numpy as np
import pytest
from tqdm import tqdm

import tinydiff as td
from tinydiff.bound import variational_bound
from tinydiff.continuous_bound import continuous_bound
from tinydiff.learned_schedule import LearnedSchedule

DIFFUSION = td.GaussianDiffusion(td.cosine_schedule(10), "v")
DATA = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)


def network():
    return td.MLP(2, hidden=4, blocks=1, time_features=4)


def rng():
    return np.random.default_rng(1)


# By the name of its bar, what has one.
LONG = {
    "training": lambda: td.train(network(), DIFFUSION, DATA, steps=2, batch_size=4).losses,
    "sampling": lambda: td.sample(network(), DIFFUSION, (4, 2), rng=rng()),
    "inverting": lambda: td.invert(network(), DIFFUSION, DATA),
    "likelihood": lambda: td.ode_log_likelihood(network(), DIFFUSION, DATA),
    "bound": lambda: variational_bound(network(), DIFFUSION, DATA, rng=rng()).value,
    "bound of a learned schedule": lambda: (
        continuous_bound(network(), LearnedSchedule(), DATA, T=10, rng=rng()).value
    ),
}


@pytest.mark.parametrize("what", LONG)
def test_a_bar_is_shown_and_its_absence_changes_nothing(what, capsys, monkeypatch):
    """A stream that was closed, as `2>&-` does, and a program in a window have none: sys.stderr is None."""
    shown = LONG[what]()
    assert what.split()[0] in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", None)
    np.testing.assert_array_equal(LONG[what](), shown)


@pytest.mark.parametrize("what", LONG)
def test_a_bar_ends_at_its_total(what, monkeypatch):
    ends, close = [], tqdm.close

    def closed(bar):
        ends.append((bar.n, bar.total))
        close(bar)

    monkeypatch.setattr(tqdm, "close", closed)
    LONG[what]()
    assert ends and all(n == total for n, total in ends)


@pytest.mark.parametrize("what", LONG)
def test_what_nobody_reads_any_more_ends_nothing(what, monkeypatch):
    """As in ``2>&1 | head -3``, or where the reader of a log has died."""
    shown, made = LONG[what](), []
    reader, writer = os.pipe()
    os.close(reader)
    with suppress(OSError), open(writer, "w") as stream:  # which on closing tries once more
        monkeypatch.setattr(sys, "stderr", stream)
        for _ in range(2):  # a second bar comes where the first has left what it could not write
            made.append(LONG[what]())
    np.testing.assert_array_equal(made, [shown, shown])


def test_the_bar_of_a_training_says_a_mean_of_the_last_losses(monkeypatch):
    """In which each step counts a fiftieth, and the first for all before it."""
    said = []
    monkeypatch.setattr(tqdm, "set_postfix", lambda bar, what, refresh: said.append(what))
    losses = td.train(network(), DIFFUSION, DATA, steps=4, batch_size=4).losses
    mean, expected = losses[0], []
    for loss in losses:
        mean += (loss - mean) / 50
        expected.append({"loss": f"{mean:.4f}"})
    assert said == expected
