"""Diffusion code of your own, held against this: which identity it breaks, and by which known mistake.

Each function takes yours, in whatever framework, asks it at every t what it gives, and raises an
AssertionError unless that is what the identity says. The message says how far off it is and at which t. If
all numbers, at every t, are to a thousandth those that a mistake of its list gives, it names that mistake;
those with an E are in chapter 9 of the docs. `assert_backward` is of a layer or a network that is written as
tinydiff's are: whether its derivative is one.

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

What is called what elsewhere, and what these checks cannot find, is in chapter 13 of the docs.
"""

from tinydiff.testing._backward import assert_backward
from tinydiff.testing._bound import assert_bound_terms
from tinydiff.testing._forward import assert_predict_x0, assert_q_sample, assert_training_target
from tinydiff.testing._loss import assert_loss
from tinydiff.testing._reverse import assert_p_mean_variance, assert_q_posterior
from tinydiff.testing._sampler import assert_sampler
from tinydiff.testing._schedule import assert_schedule

__all__ = [
    "assert_backward",
    "assert_bound_terms",
    "assert_loss",
    "assert_p_mean_variance",
    "assert_predict_x0",
    "assert_q_posterior",
    "assert_q_sample",
    "assert_sampler",
    "assert_schedule",
    "assert_training_target",
]
