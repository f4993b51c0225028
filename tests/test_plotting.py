"""The pictures show what they say they show, nothing is cut off, and nobody's matplotlib is disturbed."""

import subprocess
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from PIL import Image

import tinydiff as td
from tinydiff import plotting
from tinydiff.samplers import SamplerState

T = 50
SCHEDULES = {"linear": td.linear_schedule(T), "cosine": td.cosine_schedule(T)}


@pytest.fixture
def points():
    return td.datasets.toy2d.sample("moons", 300, np.random.default_rng(0))


@pytest.fixture
def images():
    return np.random.default_rng(1).uniform(-1, 1, (4, 6, 6, 1)).astype(np.float32)


def walk(start, steps=12):
    """States whose k-th holds the number k, and whose prediction holds -k."""
    yield SamplerState(steps, T - 1, np.zeros_like(start), None)
    for k in range(1, steps + 1):
        left, part = steps - k, np.full_like(start, k / steps)
        yield SamplerState(left, 4 * left - 1, part, -part)


def forward(x, schedules):
    return plotting.forward_process(x, schedules, np.random.default_rng(2))


# One of each, of points or images, with as much text as there may be.
FIGURES = {
    "forward": lambda x: forward(x, SCHEDULES),
    "training": lambda x: plotting.training_curve(np.exp(np.random.default_rng(2).standard_normal(200))),
    "samples": lambda x: plotting.samples_beside_data(x, x, "sliced Wasserstein 0.1234, floor 0.1234"),
    "reverse": lambda x: plotting.reverse_process(walk(x)),
    "forward of one step": lambda x: forward(x, {"short": td.linear_schedule(1)}),
    "reverse of one step": lambda x: plotting.reverse_process(walk(x, 1)),
    "much to say": lambda x: plotting.samples_beside_data(x, x, "as much as anyone would like to say " * 4),
}
every_figure = pytest.mark.parametrize("name", FIGURES)


def offsets(ax):
    """The points in a panel."""
    (dots,) = ax.collections
    return np.asarray(dots.get_offsets())


def texts(fig):
    return [t.get_text() for ax in fig.axes for t in [ax.title, *ax.texts]]


# The forward process


def test_forward_rows_are_the_schedules_at_equal_times_with_one_noise(points):
    fig = plotting.forward_process(points, SCHEDULES, np.random.default_rng(3))
    top, bottom = fig.axes[:8], fig.axes[8:]
    times = np.round(np.linspace(0, T - 1, 8)).astype(int)
    assert [ax.get_title() for ax in top] == [f"$t$ = {t}" for t in times]
    noises = []
    for row, (name, schedule) in zip([top, bottom], SCHEDULES.items(), strict=True):
        assert name in [text.get_text() for text in row[0].texts]
        for ax, t in zip(row, times, strict=True):
            abar = schedule.alphas_cumprod[t]
            noises.append((offsets(ax) - np.sqrt(abar) * points) / np.sqrt(1 - abar))
            assert any(f"{np.sqrt(abar):.2f}" in text.get_text() for text in ax.texts), f"signal at t = {t}"
    for noise in noises[1:]:
        np.testing.assert_allclose(noise, noises[0], atol=1e-3)
    assert abs(noises[0].std() - 1) < 0.2


def test_forward_of_images_begins_with_the_images(images):
    tiny = {"almost still": td.NoiseSchedule(np.full(9, 1e-12))}
    fig = plotting.forward_process(images, tiny, np.random.default_rng(4))
    shown = np.asarray(fig.axes[0].images[0].get_array())
    np.testing.assert_allclose(shown[1:7, 9:15], images[1, :, :, 0] / 2 + 0.5, atol=1e-4)


def test_forward_shows_every_time_of_a_short_chain_once(points):
    fig = plotting.forward_process(points, {"short": td.linear_schedule(3)}, np.random.default_rng(5))
    assert [ax.get_title() for ax in fig.axes] == ["$t$ = 0", "$t$ = 1", "$t$ = 2"]


def test_forward_shows_as_many_times_as_are_asked_for(points):
    fig = plotting.forward_process(points, {"linear": td.linear_schedule(61)}, np.random.default_rng(5), 13)
    assert [ax.get_title() for ax in fig.axes] == [f"$t$ = {t}" for t in range(0, 61, 5)]


@pytest.mark.parametrize("schedules", [{}, {"a": td.linear_schedule(5), "b": td.linear_schedule(6)}])
def test_forward_refuses_schedules_that_do_not_compare(points, schedules):
    with pytest.raises(ValueError, match=r"schedules have T = .*expected"):
        plotting.forward_process(points, schedules, np.random.default_rng(0))


# The reverse process


def test_reverse_shows_beneath_each_state_what_was_predicted_from_it(points):
    steps = 12
    fig = plotting.reverse_process(walk(points, steps))
    top, bottom = fig.axes[:8], fig.axes[8:]
    k = [round(float(offsets(ax)[0, 0]) * steps) for ax in top]
    predicted = [round(-float(offsets(ax)[0, 0]) * steps) for ax in bottom]
    assert k[0] == 0 and k[-1] == steps and all(a < b for a, b in pairwise(k))
    assert predicted == [i + 1 for i in k[:-1]] + [steps]
    assert top[0].get_title() == f"$t$ = {T - 1}" and top[-1].get_title() == "sample"
    assert [ax.get_title() for ax in top[1:-1]] == [f"$t$ = {4 * (steps - i) - 1}" for i in k[1:-1]]


def test_reverse_shows_the_end_more_closely(points):
    fig = plotting.reverse_process(walk(points, 200), columns=6)
    assert "from noise to samples in 200 steps" in [text.get_text() for text in fig.texts]
    gaps = np.diff([round(float(offsets(ax)[0, 0]) * 200) for ax in fig.axes[:6]])
    assert len(gaps) == 5 and gaps.sum() == 200
    assert np.all(np.diff(gaps) < 0) and gaps[0] > 3 * gaps[-1]


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_reverse_of_few_steps_shows_no_state_twice(images, steps):
    fig = plotting.reverse_process(walk(images, steps))
    titles = [ax.get_title() for ax in fig.axes[: len(fig.axes) // 2]]
    assert len(set(titles)) == len(titles) <= steps + 1


@pytest.mark.parametrize("steps", [3, 6, 7])
def test_reverse_shows_every_state_where_there_is_room(images, steps):
    fig = plotting.reverse_process(walk(images, steps), columns=8)
    assert len(fig.axes) == 2 * (steps + 1)


def test_reverse_needs_a_step(points):
    with pytest.raises(ValueError, match=r"states holds 1"):
        plotting.reverse_process(list(walk(points))[:1])


def test_what_is_drawn_of_the_processes_has_to_be_theirs(points):
    with pytest.raises(TypeError, match="states holds an ndarray; expected the SamplerState"):
        plotting.reverse_process([points, points])
    with pytest.raises(TypeError, match="schedules is a NoiseSchedule; expected what each is called"):
        plotting.forward_process(points, td.linear_schedule(5), np.random.default_rng(0))
    with pytest.raises(TypeError, match="schedule is a function; expected a NoiseSchedule"):
        plotting.forward_process(points, {"linear": td.linear_schedule}, np.random.default_rng(0))
    with pytest.raises(TypeError, match="rng is an int"):
        plotting.forward_process(points, SCHEDULES, 0)


def test_a_schedule_may_be_called_by_a_number(points):
    fig = plotting.forward_process(points, {5: td.linear_schedule(5)}, np.random.default_rng(0))
    assert "5" in [text.get_text() for text in fig.axes[0].texts]


# Samples beside data


def test_samples_and_data_keep_their_sides_and_share_limits(points):
    far = 1.9 * points
    far[7] = np.nan
    fig = plotting.samples_beside_data(far, points, "how far")
    left, right = fig.axes
    unseen = sum(not max(abs(x), abs(y)) <= 1.1 * np.abs(points).max() for x, y in far)
    assert 1 < unseen < 300  # no sample is left out unsaid
    assert (left.get_title(), right.get_title()) == ("data", f"samples, {unseen} of 300 outside")
    inside = plotting.samples_beside_data(points[:99], points)
    assert [ax.get_title() for ax in inside.axes] == ["data", "samples"]
    np.testing.assert_array_equal(offsets(left), points)
    np.testing.assert_array_equal(offsets(right), far)
    assert left.get_xlim() == right.get_xlim() == left.get_ylim() == right.get_ylim()
    of_the_data = 1.1 * np.abs(points).max()  # whatever was drawn
    assert max(left.get_xlim()) == pytest.approx(of_the_data)
    assert "how far" in [text.get_text() for text in fig.texts]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("finite", [0, 200])
def test_data_that_is_not_finite_is_counted_too(points, finite):
    data = np.vstack([points[:finite], np.full((3, 2), np.nan), [[np.inf, 0.0]]])
    fig = plotting.samples_beside_data(points, data)
    assert fig.axes[0].get_title() == f"data, 4 of {finite + 4} outside"
    limit = 1.1 * np.abs(points[:finite]).max() if finite else plotting.LIMIT
    assert max(fig.axes[1].get_xlim()) == pytest.approx(limit)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x, said: plotting.samples_beside_data(x, x, said),
        lambda x, said: forward(x, {said: td.linear_schedule(2)}),
        lambda x, said: plotting.training_curve([1.0], said),
    ],
)
def test_dollars_are_not_mathematics(draw, points, tmp_path):
    plotting.save(draw(points, "from $1_{ to $2"), tmp_path / "said.png")


def test_no_columns_are_refused(points):
    with pytest.raises(ValueError, match="columns is 0"):
        plotting.reverse_process(walk(points), columns=0)
    with pytest.raises(ValueError, match="columns is 0"):
        plotting.forward_process(points, SCHEDULES, np.random.default_rng(0), columns=0)


def test_8_bit_images_are_refused_by_name(images):
    levels = np.zeros(images.shape, np.uint8)
    for samples, data, name in [(levels, images, "samples"), (images, levels, "data")]:
        with pytest.raises(ValueError, match=rf"^{name} has dtype uint8; .*x / 127\.5 - 1"):
            plotting.samples_beside_data(samples, data)
    with pytest.raises(ValueError, match="x0 has dtype uint8"):
        plotting.forward_process(levels, SCHEDULES, np.random.default_rng(0))


def test_mosaic_reads_like_a_page_and_leaves_what_is_missing_white(images):
    fig = plotting.samples_beside_data(images[:3], images)
    samples, data = (np.asarray(ax.images[0].get_array()) for ax in fig.axes[::-1])
    assert samples.shape == data.shape == (16, 16)
    for i, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        tile = np.s_[8 * row + 1 : 8 * row + 7, 8 * column + 1 : 8 * column + 7]
        expected = images[i, :, :, 0] / 2 + 0.5
        np.testing.assert_allclose(data[tile], expected, atol=1e-6)
        np.testing.assert_allclose(samples[tile], expected if i < 3 else 0.0, atol=1e-6)
    assert (data[0], data[:, 7], data[:, 8]) == pytest.approx((0, 0, 0))


def test_ink_is_dark_on_light_paper_and_grey_values_keep_their_scale(images):
    image = plotting.samples_beside_data(images, images).axes[0].images[0]
    assert image.get_clim() == (0, 1)
    paper, ink = image.cmap([0.0, 1.0])[:, :3].mean(1)
    assert paper == 1.0 and ink == 0.0


def test_colour_images_keep_their_channels():
    red = np.full((1, 4, 4, 3), [1.0, -1.0, 5.0], np.float32)  # the last is beyond the range: clipped
    shown = np.asarray(plotting.samples_beside_data(red, red).axes[0].images[0].get_array())
    assert shown.shape == (6, 6, 3)
    np.testing.assert_array_equal(shown[2, 2], [1, 0, 1])
    np.testing.assert_array_equal(shown[0, 0], [1, 1, 1])


def test_points_beside_images_are_refused(points, images):
    with pytest.raises(ValueError, match=r"samples has shape .* and data"):
        plotting.samples_beside_data(points, images)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (0, 2), (5, 4, 4), (5, 4, 4, 2)])
def test_what_is_neither_points_nor_images_is_refused_by_name(shape):
    x = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=r"^samples has shape"):
        plotting.samples_beside_data(x, x)
    with pytest.raises(ValueError, match=r"^x0 has shape"):
        plotting.forward_process(x, SCHEDULES, np.random.default_rng(0))


def test_what_hides_points_by_a_mask_is_refused_by_name(points):
    masked = np.ma.array(points, mask=points > 0)
    for name, given in {"samples": (masked, points), "data": (points, masked)}.items():
        with pytest.raises(ValueError, match=f"{name} is a masked array"):
            plotting.samples_beside_data(*given)


# The training curve


@pytest.mark.parametrize("n", [1, 2, 49, 99, 100, 357])
def test_smooth_is_the_mean_over_the_last_fiftieth(n):
    losses = np.random.default_rng(n).uniform(0.1, 1, n)
    window = max(1, n // 50)
    expected = [losses[max(0, i + 1 - window) : i + 1].mean() for i in range(n)]
    np.testing.assert_allclose(plotting.smooth(losses), expected, rtol=1e-12)


@pytest.mark.parametrize("losses", [[], [1.0, np.nan], [[1.0]]])
def test_losses_that_are_none_are_refused(losses):
    for draw in (plotting.smooth, plotting.training_curve):
        with pytest.raises(ValueError, match=r"losses has shape"):
            draw(np.asarray(losses))


@pytest.mark.parametrize(("fall", "scale"), [(1.5, "linear"), (100.0, "log")])
def test_training_curve_labels_the_last_smoothed_loss_and_takes_logs_where_useful(fall, scale):
    losses = np.geomspace(fall, 1, 400)
    fig = plotting.training_curve(losses)
    (ax,) = fig.axes
    assert f"{plotting.smooth(losses)[-1]:.3g}" in texts(fig)
    assert ax.get_yscale() == scale
    smooth = plotting.smooth(losses)
    for line, expected in zip(ax.lines, [losses, smooth], strict=False):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([np.arange(1, 401), expected], axis=1))
    np.testing.assert_array_equal(ax.lines[2].get_xydata(), [[400, smooth[-1]]])
    assert ax.get_xlim() == (1, 400) and ax.texts[0].xy == (400, smooth[-1])


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.5), (0.01, 0.06), (0.1, 90.0), (-3.0, -2.0), (-1.0, 1.0), (0.0, 4.0)]
)
def test_all_but_the_rarest_losses_are_within_the_axis_and_its_numbers_are_the_losses(low, high):
    """Of a density's bound some losses are negative."""
    losses = np.random.default_rng(0).permutation(np.linspace(high, low, 1000))
    fig = plotting.training_curve(losses, "nats")
    fig.draw_without_rendering()
    (ax,) = fig.axes
    bottom, top = ax.get_ylim()
    assert bottom <= np.quantile(losses, 0.002) and np.quantile(losses, 0.998) <= top
    assert bottom >= 0 or low < 0
    assert ax.get_ylabel() == "nats"
    ticks = [(tick, label.get_text()) for tick, label in zip(ax.get_yticks(), ax.get_yticklabels())]
    for tick, label in ticks:
        assert float(label) == pytest.approx(tick, rel=1e-5, abs=1e-9)
    assert len({label for _, label in ticks}) > 2


@pytest.mark.parametrize("losses", [[0.5], [0.0, 0.0], [1e-9, 1e3]])
def test_training_curve_of_odd_losses_is_drawn(losses, tmp_path):
    plotting.save(plotting.training_curve(losses), tmp_path / "curve.png")


# All of them


@every_figure
@pytest.mark.parametrize("kind", ["points", "images"])
def test_no_text_is_cut_off_or_overlaps_another(kind, name, request):
    fig = FIGURES[name](request.getfixturevalue(kind))
    fig.draw_without_rendering()
    labels = [t for ax in fig.axes for t in [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]]
    boxes = {t: t.get_window_extent() for t in [*fig.texts, *labels] if t.get_text()}
    page = fig.bbox
    for text, box in boxes.items():
        inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert inside, f"{text.get_text()!r} leaves the page"
        for other, another in boxes.items():
            apart = other is text or not box.overlaps(another)
            assert apart, f"{text.get_text()!r} lies on {other.get_text()!r}"


@pytest.mark.parametrize("name", ["forward", "samples", "reverse"])
def test_panels_are_square_and_share_their_limits(points, name):
    axes = FIGURES[name](points).axes
    assert len({ax.get_xlim() for ax in axes} | {ax.get_ylim() for ax in axes}) == 1
    for ax in axes:
        box = ax.get_window_extent()
        assert box.width == pytest.approx(box.height)
        assert ax.get_aspect() == 1.0


def test_points_keep_their_colours_on_the_way(points):
    fig = FIGURES["forward"](points)
    first, *others = [ax.collections[0].get_facecolors() for ax in fig.axes]
    assert len(np.unique(first, axis=0)) > 50
    for colours in others:
        np.testing.assert_array_equal(colours, first)
    light = first[np.argsort(points[:, 0]), :3].sum(axis=1)
    assert np.all(np.diff(light) > -0.05) and light[-1] > light[0] + 0.5  # from left to right


@every_figure
def test_save_writes_a_small_png(name, points, tmp_path):
    fig = FIGURES[name](points)
    plotting.save(fig, tmp_path / "new" / "figure.png")
    with Image.open(tmp_path / "new" / "figure.png") as image:
        assert image.format == "PNG"
        width, height = fig.get_size_inches() * fig.dpi
        assert image.size == (int(width), int(height))
        rgb = np.asarray(image.convert("RGB"), int)
    assert (rgb[[0, -1]] == 255).all() and (rgb[:, [0, -1]] == 255).all(), "white margins"
    exact = np.asarray(fig.canvas.buffer_rgba(), int)[..., :3]
    assert np.abs(rgb - exact).mean() < 1, "the palette shows"


@pytest.mark.parametrize("name", ["forward", "samples"])
def test_colour_images_keep_their_colours(name, tmp_path):
    """A palette of 256 colours was off by up to 37 levels of 255, in half of such a picture's pixels."""
    colourful = np.random.default_rng(3).uniform(-1, 1, (9, 8, 8, 3)).astype(np.float32)
    fig = FIGURES[name](colourful)
    plotting.save(fig, tmp_path / "colours.png")
    with Image.open(tmp_path / "colours.png") as image:
        saved = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(saved, np.asarray(fig.canvas.buffer_rgba())[..., :3])


def test_a_picture_that_a_full_disk_refuses_is_named_and_the_old_one_stays(points, tmp_path, full_disk):
    path = tmp_path / "figure.png"
    plotting.save(FIGURES["samples"](points), path)
    before = path.read_bytes()
    with full_disk(), pytest.raises(OSError, match=r"figure\.png"):
        plotting.save(FIGURES["forward"](points), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_figure_is_the_same_file(points, tmp_path):
    fig, again = (FIGURES["samples"](points) for _ in range(2))
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for each, file in zip((fig, fig, again), files):
        plotting.save(each, file)
    first, *others = (file.read_bytes() for file in files)
    assert others == [first, first]


def test_arrays_that_are_not_numpys_are_drawn(points):
    xp = pytest.importorskip("array_api_strict")
    x = xp.asarray(points)
    fig = plotting.samples_beside_data(x, x)
    np.testing.assert_array_equal(offsets(fig.axes[0]), points)


def test_settings_of_the_user_neither_matter_nor_change(tmp_path):
    plotting.save(plotting.training_curve([1.0, 0.5]), tmp_path / "plain.png")
    mine = {"font.size": 30, "axes.labelcolor": "red", "figure.facecolor": "black", "image.origin": "lower"}
    with matplotlib.rc_context(mine):
        plotting.save(plotting.training_curve([1.0, 0.5]), tmp_path / "mine.png")
        assert {key: matplotlib.rcParams[key] for key in mine} == mine
    assert (tmp_path / "mine.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_matplotlib_is_imported_late_and_pyplot_never():
    program = (
        "import sys, numpy as np, tinydiff.plotting as p\n"
        "assert 'matplotlib' not in sys.modules\n"
        "p.training_curve(np.ones(3))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_matplotlib_one_sentence_says_what_to_install(points, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'^Pictures need matplotlib: pip install "tinydiff\[demos\]"\.$'):
        plotting.training_curve([1.0])


def test_what_is_no_figure_is_not_saved(tmp_path):
    path = tmp_path / "kept.png"
    path.write_bytes(b"before")
    for what, came in [(None, "a NoneType"), (np.zeros((2, 2)), "an ndarray")]:
        with pytest.raises(TypeError, match=f"^fig is {came}; expected a figure"):
            plotting.save(what, path)
    assert path.read_bytes() == b"before"
