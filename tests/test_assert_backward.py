"""testing.assert_backward: a right derivative passes, and what is wrong with another is said.

Every layer of the package is held against it in ``test_layers.py``; here are layers with one mistake each.
"""

import re

import numpy as np
import pytest

from tinydiff import nn, testing


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


class Product(nn.Module):
    """y = (x W + c) z, for x and z (N, D), W (D, D) and c (D): right until a test replaces a method."""

    def __init__(self, D=4, dtype=np.float64):
        self.weight = nn.Parameter(np.zeros((D, D), dtype))
        self.bias = nn.Parameter(np.zeros(D, dtype))

    def __call__(self, x, z):
        h = x @ self.weight.value + self.bias.value
        y = self.output(h * z)

        def backward(dy):
            dh = dy * z
            self.keep(self.weight, self.of_weight(x, dh))
            self.keep(self.bias, self.of_bias(dh))
            return self.inputs(self.of_x(dh), self.of_z(h, dy))

        return y, backward

    def output(self, y):
        return y

    def keep(self, parameter, gradient):
        parameter.accumulate(gradient)

    def of_weight(self, x, dh):
        return x.T @ dh

    def of_bias(self, dh):
        return np.sum(dh, axis=0)

    def of_x(self, dh):
        return dh @ self.weight.value.T

    def of_z(self, h, dy):
        return h * dy

    def inputs(self, dx, dz):
        return dx, dz


def with_mistake(**methods):
    return type("Wrong", (Product,), methods)()


def refusal(layer, *inputs, error=AssertionError, **options):
    with pytest.raises(error) as caught:
        testing.assert_backward(layer, *inputs, **options)
    return str(caught.value)


X, Z = normal(5, 4), normal(5, 4, seed=1)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_right_is_right(seed, dtype):
    testing.assert_backward(Product(dtype=dtype), X.astype(dtype), Z, seed=seed)


def first_off(dh):
    """A bias's gradient of which one number of four is a thousandth off."""
    return np.sum(dh, axis=0) * np.array([1.001, 1, 1, 1])


MISTAKES = {
    "sign": (
        {"of_z": lambda self, h, dy: -h * dy},
        r"gradient of input 1 is off by .*\nIt is what comes of this: the sign\.",
    ),
    "mean": (
        {"of_bias": lambda self, dh: np.mean(dh, axis=0)},
        r"'bias' is off by .*\n.* a factor of 0\.2, as of a mean over the batch where there is a sum\.",
    ),
    "half": ({"of_bias": lambda self, dh: np.sum(dh, axis=0) / 2}, r"a factor of 0\.5\."),
    "a thousandth": ({"of_bias": lambda self, dh: 1.001 * np.sum(dh, axis=0)}, r"a factor of 1\.001\."),
    "transposed": ({"of_weight": lambda self, x, dh: dh.T @ x}, r"'weight'.*\n.*: a transpose\."),
    "exchanged": ({"inputs": lambda self, dx, dz: (dz, dx)}, r"input 0.*\nIt is the gradient of input 1\."),
    "not transposed": (
        {"of_x": lambda self, dh: dh @ self.weight.value},
        r"input 0.*\nOf 20 of its numbers 20",
    ),
    "one number": (
        {"of_bias": lambda self, dh: first_off(dh)},
        r"'bias'.*\nOf 4 of its numbers 1 are off, most that at \(0,\): ",
    ),
    "none of a parameter": (
        {"of_bias": lambda self, dh: np.zeros(4)},
        r"'bias'.*\nIt is 0: backward adds nothing to its grad\.",
    ),
    "none of an input": ({"of_z": lambda self, h, dy: 0 * h}, r"input 1.*\nIt is 0\.$"),
    "not added": (
        {"keep": lambda self, parameter, gradient: setattr(parameter, "grad", gradient)},
        r"the grad of parameter 'weight' that is there is not added to \(docs: B.25\)",
    ),
    "a gradient too few": (
        {"inputs": lambda self, dx, dz: dx},
        r"returns 1 gradients; expected 2, one for each input of floating numbers\. Where some have none",
    ),
    "a list": (
        {"inputs": lambda self, dx, dz: [dx, dz]},
        r"backward returns a list; expected an array, or of several a tuple",
    ),
    "no gradient": ({"inputs": lambda self, dx, dz: None}, r"returns 0 gradients; expected 2"),
    "no array": ({"of_z": lambda self, h, dy: None}, r"input 1 is None; expected float64 \(5, 4\)"),
    "shape": ({"of_x": lambda self, dh: dh[0]}, r"input 0 is float64 \(4,\); expected float64 \(5, 4\)"),
    "dtype": (
        {"of_z": lambda self, h, dy: (h * dy).astype(np.float32)},
        r"input 1 is float32 \(5, 4\); expected float64 \(5, 4\)",
    ),
    "not linear": (
        {"of_z": lambda self, h, dy: h * np.clip(dy, -9, 9)},
        r"gradient of input 1 is not 1\.05e\+06 times as large for a dy that is; expected .* linear in dy",
    ),
    "none of what is small": (
        {"of_z": lambda self, h, dy: h * np.where(np.abs(dy) < 1e-5, 0, dy)},
        r"gradient of input 1 is not 9\.54e-07 times as large",
    ),
    "infinite": ({"of_z": lambda self, h, dy: h * dy / 0.0}, r"gradient of input 1 is not finite"),
    "always float32": (
        {"output": lambda self, y: y.astype(np.float32)},
        r"y is of float32 where inputs and parameters are of float64",
    ),
    "float64 of float32": (
        {"output": lambda self, y: y * np.sqrt(1.0)},
        r"y is of float64 where inputs and parameters are of float32\. A number of NumPy's, such as np\.sqrt",
    ),
    "gradients in float64 of float32": (
        {"of_z": lambda self, h, dy: h * dy * np.sqrt(1.0)},
        r"gradient of input 1 is float64 \(5, 4\); expected float32 \(5, 4\)",
    ),
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said(mistake):
    methods, message = MISTAKES[mistake]
    assert re.search(message, refusal(with_mistake(**methods), X, Z))


def test_what_is_kept_on_the_layer():
    class Keeping(nn.Module):
        def __call__(self, x):
            self.x = x
            return x**2, lambda dy: 2 * self.x * dy

    said = refusal(Keeping(), X)
    assert "the gradient of input 0 is another if the layer is called again before backward" in said


def test_what_is_kept_on_the_layer_though_alike_at_once_and_again():
    """A mask of signs, of dropout, and the classes: the other call has others."""

    class Keeping(nn.Module):
        def __init__(self, keep):
            self.keep, self.rows = keep, nn.Parameter(np.zeros((3, 4)))

        def __call__(self, x, rng, y):
            kept = {
                "signs": x > 0,
                "dropout": rng.random(x.shape) < 0.5,
                "classes": np.eye(3, dtype=x.dtype)[y],
            }
            self.kept = kept[self.keep]

            def backward(dy):
                now = kept | {self.keep: self.kept}
                self.rows.accumulate(now["classes"].T @ dy)
                return dy * now["signs"] * now["dropout"]

            return x * kept["signs"] * kept["dropout"] + kept["classes"] @ self.rows.value, backward

    rng, classes = np.random.default_rng(3), np.array([0, 2, 2, 1, 1])
    for keep, name in [("signs", "input 0"), ("dropout", "input 0"), ("classes", "parameter 'rows'")]:
        said = refusal(Keeping(keep), X, rng, classes)
        assert f"the gradient of {name} is another if the layer is called again" in said


def test_inputs_that_cannot_be_reversed():
    """Another call that the layer refuses spoils nothing."""

    def layer(sigmas):
        if np.any(np.diff(sigmas) >= 0):
            raise ValueError("sigmas must decrease")
        return np.log(sigmas), lambda dy: dy / sigmas

    def segments(x, starts):
        lengths = np.diff(np.append(starts, len(x)))
        return np.add.reduceat(x, starts), lambda dy: np.repeat(dy, lengths)

    testing.assert_backward(layer, np.array([80.0, 10.0, 0.1]))
    testing.assert_backward(segments, normal(9), np.array([0, 2, 5]))


@pytest.mark.parametrize("name", ["y", "the gradient of input 0"])
def test_an_array_for_several_calls(name):
    buffer = np.zeros_like(X)

    def layer(x):
        if name == "y":
            return np.multiply(x, 2, out=buffer), lambda dy: 2 * dy
        return x**2, lambda dy: np.multiply(2 * x, dy, out=buffer)

    assert refusal(layer, X) == f"{name} is written to by a later call; expected one for each call."


def test_what_is_written_to_by_the_forward():
    """Though the second time there is nothing left to write, and though it be classes."""
    said = refusal(lambda x: (np.maximum(x, 0, out=x), lambda dy: dy * (x > 0)), X)
    assert said.startswith("input 0 is written to")
    classes = np.array([0, 2, 2, 1, 0])

    def layer(x, y):
        rows = np.eye(4)[y]
        y[:] = 0
        return x * rows, lambda dy: dy * rows

    assert refusal(layer, X, classes).startswith("input 1 is written to")
    assert np.array_equal(classes, [0, 2, 2, 1, 0])


@pytest.mark.parametrize(
    ("written", "name"), [("x", "input 0"), ("weight", "parameter 'weight'"), ("dy", "dy")]
)
def test_what_is_written_to(written, name):
    class Writing(Product):
        def __call__(self, x, z):
            y, backward = super().__call__(x, z)
            y = y.copy()

            def call(dy):
                gradients = backward(dy)
                {"x": x, "weight": self.weight.value, "dy": dy}[written][:] *= 1.0 + 1e-9
                return gradients

            return y, call

    assert refusal(Writing(), X, Z).startswith(f"{name} is written to")


def test_inputs_and_parameters_are_as_they_were():
    layer = Product(dtype=np.float32)
    layer.bias.grad = np.ones(4, np.float32)
    x, value, grad = X.copy(), layer.weight.value, layer.bias.grad
    testing.assert_backward(layer, X, Z)
    refusal(with_mistake(of_z=lambda self, h, dy: -h * dy), X, Z)
    assert layer.weight.value is value and not np.any(value)
    assert layer.bias.grad is grad and np.all(grad == 1)
    assert np.array_equal(X, x)


def test_a_layer_that_begins_at_zero_hides_no_error():
    """Without the parameters' move h, and so the gradient of z, would be 0 with whatever sign."""
    layer = with_mistake(of_z=lambda self, h, dy: -h * dy)
    assert not any(np.any(p.value) for p in layer.named_parameters().values())
    assert "the sign" in refusal(layer, X, Z)


def test_functions_and_their_parameters():
    """A function has those parameters that it is said to have."""
    layer = Product()
    wrong = with_mistake(of_bias=lambda self, dh: 2 * np.sum(dh, axis=0))
    testing.assert_backward(lambda z: _second(layer, z), Z, parameters=layer.named_parameters())
    testing.assert_backward(lambda z: _second(wrong, z), Z)
    said = refusal(lambda z: _second(wrong, z), Z, parameters=wrong.named_parameters())
    assert "a factor of 2." in said


def test_a_method_has_the_parameters_of_its_module():
    wrong = with_mistake(of_bias=lambda self, dh: 2 * np.sum(dh, axis=0))
    assert "parameter 'bias'" in refusal(wrong.__call__, X, Z)


def test_a_parameter_with_two_names():
    """It is one, under the first."""
    layer = Product()
    testing.assert_backward(layer, X, Z, parameters={"a": layer.weight, "b": layer.weight, "c": layer.bias})


def test_a_parameter_that_has_a_domain():
    """It is moved less where y would not be finite."""

    class Log(nn.Module):
        def __init__(self):
            self.scale = nn.Parameter(np.full(4, 0.05))

        def __call__(self, x):
            scale = self.scale.value

            def backward(dy):
                self.scale.accumulate(np.sum(dy * x, axis=0) / scale)
                return dy * np.log(scale)

            return x * np.log(scale), backward

    for seed in range(5):
        testing.assert_backward(Log(), X, seed=seed)


def _second(layer, z):
    y, backward = layer(X, z)
    return y, lambda dy: backward(dy)[1]


def test_times_classes_and_generators_are_passed_on():
    """They have no gradients; a generator draws the same at every call."""
    rows = nn.Parameter(normal(3, 4))

    def layer(x, y, rng, scale):
        mask = rng.random(x.shape) < 0.5

        def backward(dy):
            gradient = np.zeros_like(rows.value)
            np.add.at(gradient, y, scale * dy)
            rows.accumulate(gradient)
            return dy * mask * scale

        return scale * (x * mask + rows.value[y]), backward

    rng, classes = np.random.default_rng(3), np.array([0, 2, 2, 1, 0])
    testing.assert_backward(layer, X, classes, rng, 2, parameters={"rows": rows})
    assert rng.random() == np.random.default_rng(3).random()

    def look_up(y):
        return rows.value[y], lambda dy: rows.accumulate(np.eye(3)[y].T @ dy)

    testing.assert_backward(look_up, classes, parameters={"rows": rows})


def test_another_output_at_every_call():
    rng = np.random.default_rng(0)

    def layer(x):
        mask = rng.random(x.shape) < 0.5
        return x * mask, lambda dy: dy * mask

    assert "y is another at a second call" in refusal(layer, X)


def test_a_number_for_an_output():
    testing.assert_backward(lambda x: (np.mean(x**2), lambda dy: dy * 2 * x / x.size), X)
    assert "a factor of 20." in refusal(lambda x: (np.mean(x**2), lambda dy: dy * 2 * x), X)


def test_what_is_curved_and_what_is_constant():
    """Truncation is no error of the derivative; of a constant the derivative is 0, and nothing else."""
    testing.assert_backward(lambda x: (np.sin(1000 * x), lambda dy: 1000 * np.cos(1000 * x) * dy), X)
    testing.assert_backward(lambda x: (np.ones(3), lambda dy: 0 * x), X)
    said = refusal(lambda x: (np.ones(3), lambda dy: 1e-3 * x), X)
    assert said.endswith("Expected 0: y does not depend on it.")


SIGMAS = np.geomspace(0.002, 80, 12)


@pytest.mark.parametrize("x", [1e-6 * np.exp(X), np.exp(X), 255 * np.exp(X), SIGMAS])
def test_numbers_that_have_a_domain_and_a_scale(x):
    """Steps in proportion to them leave neither."""
    for layer, slope in [(np.log, lambda x: 1 / x), (np.sqrt, lambda x: x**-0.5 / 2)]:
        testing.assert_backward(lambda x, f=layer, g=slope: (f(x), lambda dy: g(x) * dy), x)
    for at in range(x.shape[0]):
        wrong = np.where(np.arange(x.size).reshape(x.shape) == at, 1.01, 1)
        said = refusal(lambda x, w=wrong: (np.log(x), lambda dy: w / x * dy), x)
        assert f"1 are off, most that at {tuple(int(i) for i in np.unravel_index(at, x.shape))}" in said


def test_a_small_gradient_beside_a_large_one():
    """It has a tolerance of its own."""

    def layer(factor):
        def call(x, z):
            return 1e4 * np.sin(x) + z**2, lambda dy: (1e4 * np.cos(x) * dy, factor * z * dy)

        return call

    testing.assert_backward(layer(2), X, Z)
    assert "input 1" in refusal(layer(2.0002), X, Z)


def test_a_small_change_of_a_large_number():
    for seed in range(5):
        testing.assert_backward(lambda x: (1e6 + x**2, lambda dy: 2 * x * dy), X, seed=seed)
    assert "a factor of 1.001." in refusal(lambda x: (1e6 + x**2, lambda dy: 2.002 * x * dy), X)


def test_a_sum_that_is_constant():
    """Its differences are rounding, its gradient 0."""

    def layer(x):
        e = np.exp(x)
        p = e / np.sum(e, axis=-1, keepdims=True)

        def backward(dy):
            return p * (dy[:, None] - np.sum(dy[:, None] * p, axis=-1, keepdims=True))

        return np.sum(p, axis=-1), backward

    for seed in range(5):
        testing.assert_backward(layer, X, seed=seed)


def test_what_is_rounded_on_the_way():
    class Rounded(nn.Module):
        def __init__(self, sign):
            self.sign = sign

        def __call__(self, x):
            y = np.tanh(x.astype(np.float32)).astype(x.dtype)
            return y, lambda dy: self.sign * dy * (1 - y**2)

    assert "cannot be told from differences: those of different steps do not agree" in refusal(Rounded(1), X)
    assert "is off by" in refusal(Rounded(-1), X)


def test_kinks():
    """Near one all is well; at one it is said that there is one."""

    def relu(x):
        return np.maximum(x, 0), lambda dy: dy * (x > 0)

    for seed in range(5):
        testing.assert_backward(relu, 1e-4 * X, seed=seed)
        testing.assert_backward(relu, np.array([1.0, 1e-7, -1e-7]), seed=seed)
    assert "There is a kink: the slopes to both sides are" in refusal(relu, np.maximum(X, 0))
    assert "kink" not in refusal(lambda x: (x**3, lambda dy: dy), X)


def test_dy_is_not_the_input():
    """Though both come of the same seed: a backward that takes one for the other would be right."""

    def swapped(x):
        return x * np.sum(x**2), lambda dy: 3 * np.sum(x**2) * dy

    assert "input 0" in refusal(swapped, X, seed=0)


def test_a_vector_is_no_transpose_of_itself():
    said = refusal(lambda x: (x, lambda dy: dy * (1 + 3e-6 * np.arange(4))), normal(4))
    assert "transpose" not in said and "are off, most that at" in said


def test_one_number_of_many():
    """It need not be among those that are looked at."""
    x = normal(10_000)
    wrong = np.where(np.arange(x.size) == 1234, 2.0, 1.0)
    said = refusal(lambda x: (x**2, lambda dy: 2 * x * dy * wrong), x)
    assert said.endswith("\nIt is not in 200 of its 10000 numbers: few are off, or all by little.")


def test_y_that_is_not_finite():
    assert refusal(lambda x: (x * np.inf, lambda dy: dy), X) == "y is not finite."


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Product, "layer is the class Product; expected a function"),
        (3, "layer is an int; expected a function"),
        (lambda x: x, r"layer returns \(ndarray\); expected \(y, backward\), a NumPy array and a function"),
        (lambda x: (0.5, 2 * x), r"layer returns \(float, ndarray\); expected \(y, backward\)"),
        (lambda x: (x, x), r"layer returns \(ndarray, ndarray\)"),
    ],
)
def test_what_is_no_layer(layer, message):
    assert re.search(message, refusal(layer, X, error=TypeError))


def test_bad_arguments():
    def layer(x):
        return x, lambda dy: dy

    said = refusal(layer, np.arange(3), error=ValueError)
    assert said == "no input is an array of floats and there is no parameter; expected one."
    with pytest.raises(ValueError, match=r"y is empty, of shape \(0, 4\)"):
        testing.assert_backward(layer, X[:0])
    with pytest.raises(ValueError, match="input 0 is not finite; expected finite numbers"):
        testing.assert_backward(layer, np.array([1.0, np.inf]))
    for parameters, said in [([X], "is a list"), ({"x": X}, r"\['x'\] is an? .*ndarray")]:
        with pytest.raises(TypeError, match=f"parameters{said}" if "[" in said else f"parameters {said}"):
            testing.assert_backward(layer, X, parameters=parameters)
    for options in [{"tolerance": 0}, {"tolerance": "small"}, {"seed": -1}]:
        assert next(iter(options)) in refusal(layer, X, error=ValueError, **options)
