"""Your own diffusion code, checked against this: which identity it breaks, and by which known mistake.

Each check takes a function of yours, in whatever framework, calls it, at every t if it takes one, and raises
an AssertionError unless it returns what the identity says. The message says how far off it is and at which t.
If all numbers are to a thousandth those that a mistake on the check's list gives, the message names that
mistake; those with an E are in chapter 9 of the docs. `assert_training_draws` calls a loss that draws for
itself, and judges by statistics; `assert_adam` and `assert_ema` look at an optimizer's steps and at averages
of weights, `assert_time_embedding` and `assert_attention` at parts of a network, `assert_frechet_distance` at
a measure. `assert_backward` takes a layer or a network that is written as tinydiff's are, and checks that its
backward is its derivative.

>>> import torch
>>> from tinydiff import linear_schedule, testing
>>> abar = torch.as_tensor(linear_schedule().alphas_cumprod)
>>> rate = lambda r: r[:, None, None, None]
>>> def q_sample(x0, t, noise):
...     return rate(abar[t]) ** 0.5 * x0 + rate(1 - abar[t]) * noise
>>> testing.assert_q_sample(q_sample, linear_schedule(), asarray=torch.as_tensor)
Traceback (most recent call last):
...
AssertionError: ...

Chapter 13 of the docs says what things are called elsewhere, and what these checks cannot find.
"""

from tinydiff.testing._adam import assert_adam
from tinydiff.testing._attention import assert_attention
from tinydiff.testing._backward import assert_backward
from tinydiff.testing._bound import assert_bound_terms
from tinydiff.testing._draws import assert_training_draws
from tinydiff.testing._ema import assert_ema
from tinydiff.testing._forward import assert_predict_x0, assert_q_sample, assert_training_target
from tinydiff.testing._frechet import assert_frechet_distance
from tinydiff.testing._guidance import assert_guided
from tinydiff.testing._hybrid import assert_hybrid_gradient
from tinydiff.testing._loss import assert_loss
from tinydiff.testing._reverse import assert_p_mean_variance, assert_q_posterior
from tinydiff.testing._sampler import assert_sampler
from tinydiff.testing._schedule import assert_schedule
from tinydiff.testing._time_embedding import assert_time_embedding

__all__ = [
    "assert_adam",
    "assert_attention",
    "assert_backward",
    "assert_bound_terms",
    "assert_ema",
    "assert_frechet_distance",
    "assert_guided",
    "assert_hybrid_gradient",
    "assert_loss",
    "assert_p_mean_variance",
    "assert_predict_x0",
    "assert_q_posterior",
    "assert_q_sample",
    "assert_sampler",
    "assert_schedule",
    "assert_time_embedding",
    "assert_training_draws",
    "assert_training_target",
]
