"""What stays on the device: a step of training and of sampling sends nothing back to the host.

Counted under array-api-strict, whose arrays stand on a device that is not the host here; everything by which
a value could leave it is counted (`namespaces.transfers`).
"""

import numpy as np
import pytest
from namespaces import assert_there, named, space, training_step, transfers
from numpy.testing import assert_allclose, assert_array_equal
from runs import POINTS, Interrupted, assert_same_weights, drawn, failing, lines, weights_of

import tinydiff as td
from tinydiff import _run
from tinydiff.backend import clip_to_unit, to_numpy
from tinydiff.checkpoint import load_arrays

PROCESS = td.GaussianDiffusion(td.cosine_schedule(20), "v")
LEARNED = td.GaussianDiffusion(td.cosine_schedule(20), "eps", "learned_range")
STEPS = 12
SETTINGS = dict(steps=STEPS, batch_size=4, seed=3, lr=0.01, warmup=2, log_every=5, progress=False)


def mlp(where=None, out=2):
    model = td.MLP(2, out, hidden=8, blocks=2, time_features=4, rng=np.random.default_rng(1))
    return model if where is None else where.module(model, "float32")


def told(where):
    """A network that is told classes."""
    rng = np.random.default_rng(1)
    return where.module(td.MLP(hidden=8, blocks=2, time_features=4, num_classes=3, rng=rng), "float32")


def unet(where):
    model = td.UNet(block_channels=(4, 8), attention=(False, True), norm_groups=2, head_dim=4, dropout=0.3)
    return where.module(model, "float32")


# The counter itself


@pytest.mark.parametrize(
    "leave",
    [float, int, bool, complex, to_numpy, np.from_dlpack, lambda x: "reached" if x > 0 else "", range],
    ids=["float", "int", "bool", "complex", "to_numpy", "dlpack", "if", "index"],
)
def test_the_counter_sees(leave):
    where = space("strict")
    x = where.array(np.asarray(3, np.int64 if leave is range else np.float32))
    with transfers() as seen:
        x = x + x
        assert seen == []
        leave(x)
    assert len(seen) == 1


def test_the_counter_refuses_shapes_that_depend_on_values():
    where = space("strict")
    x = where.array(POINTS)
    with transfers():
        for hidden in (lambda: x[x > 0], lambda: where.xp.nonzero(x)):
            with pytest.raises(RuntimeError):
                hidden()


# One step


@pytest.mark.parametrize(
    ("make", "diffusion", "how"),
    [
        (unet, PROCESS, {}),
        (mlp, PROCESS, {}),
        (mlp, PROCESS, {"min_snr_gamma": 5.0}),
        (mlp, PROCESS, {"loss": "vlb"}),
        (lambda where: mlp(where, out=4), LEARNED, {"loss": "hybrid"}),
        (told, PROCESS, {"labels": np.array([0, 3, 1, 2, 0, 0])}),
        (told, PROCESS, {}),
    ],
)
def test_a_step_sends_nothing_back(make, diffusion, how):
    where = space("strict")
    model = make(where)
    x0 = where.array(np.full((6, 8, 8, 1) if make is unet else (6, 2), 0.5, np.float32))
    step, rng = training_step(model, diffusion, x0, **how), np.random.default_rng(0)
    before = weights_of(model)
    with transfers() as seen:
        for _ in range(3):
            loss = step(rng)
    assert seen == []
    assert_there(loss, where, "float32", "the loss")
    assert any(np.any(before[name] != value) for name, value in weights_of(model).items())


@pytest.mark.parametrize("sampler", td.samplers.SAMPLERS)
@pytest.mark.parametrize("clip", [False, True])
def test_sampling_sends_nothing_back(sampler, clip):
    where = space("strict")
    with transfers() as seen:
        x = td.sample(
            mlp(where),
            td.GaussianDiffusion(td.linear_schedule(20)),
            (5, 2),
            sampler,
            steps=4,
            rng=np.random.default_rng(0),
            eta=0.5 * (sampler == "ddim"),
            clip=clip,
            batch_size=2,
            progress=False,
        )
    assert seen == []
    assert_there(x, where, "float32", "the sample")


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_guided_sampling_sends_nothing_back(w):
    """And is that of the host, by labels that are there or here."""
    where, y = space("strict"), np.array([0, 3, 1, 1, 2])
    how = dict(sampler="ddim", steps=4, guidance_scale=w, batch_size=2, progress=False)
    x_T = np.random.default_rng(0).standard_normal((5, 2)).astype(np.float32)
    for labels in (y, where.array(y)):
        model, rng = told(where), np.random.default_rng(0)
        with transfers() as seen:
            x = td.sample(model, PROCESS, (5, 2), rng=rng, x_T=where.array(x_T), labels=labels, **how)
        assert seen == []
        assert_there(x, where, "float32", "the sample")
    expected = td.sample(told(space("numpy")), PROCESS, (5, 2), rng=rng, x_T=x_T, labels=y, **how)
    assert_allclose(to_numpy(x), expected, rtol=1e-4, atol=1e-5)


def test_clipping_under_cupys_wrapper_would_wait():
    """Why `clip_to_unit` is not xp.clip: array-api-compat selects by a mask, and the host needs its count."""
    import inspect

    from array_api_compat.common import _aliases

    if "[ia]" not in inspect.getsource(_aliases.clip):
        pytest.skip("array-api-compat clips otherwise by now: clip_to_unit may become xp.clip")
    x = space("strict").array(3 * POINTS)
    with transfers() as seen:
        clipped = clip_to_unit(x)
    assert seen == []
    assert_array_equal(to_numpy(clipped), np.clip(3 * POINTS, -1, 1))


# The loop


def test_train_reads_once_for_each_line():
    where = space("strict")
    model = mlp(where)
    with transfers() as seen:
        result = td.train(model, PROCESS, POINTS, **SETTINGS)
    assert seen == ["__dlpack__"] * 3  # after steps 5, 10 and 12
    assert_allclose(result.losses, td.train(mlp(), PROCESS, POINTS, **SETTINGS).losses, rtol=1e-5)


def test_importance_sampling_reads_every_step():
    """t of the next step depends on the losses of this one."""
    model = mlp(space("strict"))
    with transfers() as seen:
        td.train(model, PROCESS, POINTS, **SETTINGS, loss="vlb", importance_sampling=True)
    assert len(seen) == 2 * STEPS  # the terms, and the loss with the norm


def test_between_checkpoints_nothing_but_lines(tmp_path, monkeypatch):
    model = mlp(space("strict"))
    events = []

    def noting(name, original):
        def note(self, *args):
            events.append((name, len(seen)))
            original(self, *args)
            events.append(("done", len(seen)))

        return note

    for name in ("log", "save"):
        monkeypatch.setattr(_run.Run, name, noting(name, getattr(_run.Run, name)))
    with transfers() as seen:
        td.train(model, PROCESS, POINTS, **SETTINGS, run_dir=tmp_path, checkpoint_every=6)
    names = [name for name, _ in events if name != "done"]
    assert names == ["log", "save", "log", "log", "save"]  # at 5, 6, 10, 12 and 12
    per_save = 4 * len(model.named_parameters())  # weights, average and two moments
    readings = 4  # at 5, 6, 10 and 12
    assert len(seen) == 1 + readings + 2 * per_save
    spent = [after - before for (_, before), (_, after) in zip(events[::2], events[1::2])]
    assert spent == [0, per_save, 0, 0, per_save]


@pytest.mark.parametrize("whose", ["numpy", "another device"])
def test_the_data_set_crosses_once(whose, monkeypatch):
    where = space("strict")
    data = np.zeros((1000, 2), np.float32)
    data = data if whose == "numpy" else where.xp.asarray(data)  # on strict's own host
    sizes = []
    original = where.xp.asarray

    def asarray(obj, **kwargs):
        if getattr(obj, "device", where.device) != where.device:  # a NumPy array's is "cpu"
            sizes.append(obj.size)
        return original(obj, **kwargs)

    monkeypatch.setattr(where.xp, "asarray", asarray)
    model = mlp(where)
    sizes.clear()
    td.train(model, PROCESS, data, **SETTINGS)
    assert sizes.count(data.size) == 1
    assert max(size for size in sizes if size != data.size) <= 8  # noise of a batch of points, and less


@named
def test_data_may_be_there_already_or_drawn_anywhere(name):
    where = space(name)
    runs = []
    for data in (POINTS, where.array(POINTS), POINTS.astype(np.float64)):
        runs.append(td.train(mlp(where), PROCESS, data, **SETTINGS).losses)
    assert_array_equal(runs[0], runs[1])
    assert_array_equal(runs[0], runs[2])
    for data in (lambda n, rng: POINTS[:n], lambda n, rng: where.array(POINTS[:n])):
        runs.append(td.train(mlp(where), PROCESS, data, **SETTINGS).losses)
    assert_array_equal(runs[3], runs[4])


# The run survives as it does on the host


@named
@pytest.mark.parametrize("at", [1, 5, 7, 11])
def test_interrupted_and_resumed_is_the_same_run(name, at, tmp_path):
    where = space(name)
    files = dict(checkpoint_every=4)
    whole = mlp(where)
    result = td.train(whole, PROCESS, drawn, **SETTINGS, **files, run_dir=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        data = failing(POINTS, at, KeyboardInterrupt())
        td.train(mlp(where), PROCESS, data, **SETTINGS, **files, run_dir=tmp_path / "parts")
    assert load_arrays(tmp_path / "parts" / "checkpoint.safetensors")[1]["step"] == at
    model = mlp(where)
    again = td.train(model, PROCESS, drawn, **SETTINGS, **files, run_dir=tmp_path / "parts", resume=True)
    assert_same_weights(model, whole)
    assert_same_weights(again.model, result.model)
    assert_array_equal(again.losses, result.losses)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


OVERFLOWS = 1e30  # squared it is infinite: data that is not finite itself would be refused


def poisoned(at):
    calls = iter(range(10**9))
    return lambda n, rng: drawn(n, rng) * np.float32(OVERFLOWS if next(calls) == at else 1)


@named
@pytest.mark.parametrize("at", [0, 3, 7, 10])
def test_where_numbers_stop_being_finite(name, at, tmp_path):
    """On the host the weights are those before the bad step, elsewhere those of the last sound reading."""
    where = space(name)
    files = dict(checkpoint_every=4)
    model = mlp(where)
    with pytest.raises(FloatingPointError, match=rf"loss is (inf|nan) .* at step {at} .*smaller") as caught:
        td.train(model, PROCESS, poisoned(at), **SETTINGS, **files, run_dir=tmp_path)
    sound = at if name == "numpy" else max(step for step in (0, 4, 5, 8, 10) if step <= at)
    assert ("back to those after" in str(caught.value)) == (name != "numpy")
    assert name == "numpy" or f"after {sound} steps" in str(caught.value)
    checkpoint = tmp_path / "checkpoint.safetensors"
    assert (load_arrays(checkpoint)[1]["step"] if checkpoint.exists() else 0) == at // 4 * 4
    expected = mlp(where)
    with pytest.raises(Interrupted):
        td.train(expected, PROCESS, failing(POINTS, sound, Interrupted()), **SETTINGS)
    assert_same_weights(model, expected)


def test_ctrl_c_over_numbers_that_are_not_finite_saves_nothing(tmp_path):
    calls = iter(range(10**9))

    def draw(n, rng):
        call = next(calls)
        if call == 4:
            raise KeyboardInterrupt
        return POINTS[:n] * np.float32(OVERFLOWS if call == 2 else 1)

    with pytest.raises(KeyboardInterrupt):
        td.train(mlp(space("strict")), PROCESS, draw, **SETTINGS, run_dir=tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()


@named
def test_it_learns(name):
    where = space(name)
    model = td.MLP(hidden=16, blocks=1, time_features=8)
    how = dict(steps=200, batch_size=64, lr=0.01, progress=False)
    result = td.train(where.module(model, "float32"), PROCESS, np.full((8, 2), 0.5), **how)
    assert np.mean(result.losses[-50:]) < 0.3 * np.mean(result.losses[:5])


@named
@pytest.mark.parametrize("make", [mlp, unet])
def test_the_same_seed_is_the_same_run(name, make):
    where = space(name)
    data = np.zeros((6, 8, 8, 1), np.float32) if make is unet else POINTS
    runs = [td.train(make(where), PROCESS, data, **{**SETTINGS, "steps": 4}).losses for _ in range(2)]
    if name == "cupy":  # atomic additions, if a routine uses them, come in any order
        assert_allclose(runs[0], runs[1], rtol=1e-4)
    else:
        assert_array_equal(runs[0], runs[1])
