"""What goes through a line between processes comes out at the other end, and a closed end is noticed."""

import multiprocessing
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinydiff import _messages
from tinydiff._messages import Line

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs a system that forks"
)

KINDS = hnp.floating_dtypes() | hnp.integer_dtypes() | hnp.boolean_dtypes() | hnp.complex_number_dtypes()


@pytest.fixture(scope="module")
def line():
    here, there = Line.ends()
    yield here, there
    here.close()
    there.close()


@given(
    array=hnp.arrays(KINDS, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)),
    step=st.sampled_from([1, 2, -1]),
    rest=st.lists(st.none() | st.integers() | st.text() | st.lists(st.integers())),
)
def test_arrays_arrive_whole_and_are_ones_own(line, array, step, rest):
    """Of either byte order, strided and transposed ones, and among other things."""
    here, there = line
    sent = array.T[::step] if array.ndim else array
    here.send("what", sent, *rest, sent)
    what, first, *others, last = there.receive()
    assert what == "what" and others == rest
    for received in (first, last):
        np.testing.assert_array_equal(received, sent)
        assert received.dtype == sent.dtype and type(received) is np.ndarray
        if received.size:
            received[...] = 1  # not what the sender holds, nor the other
    np.testing.assert_array_equal(array.T[::step] if array.ndim else array, sent)


def test_what_is_not_an_array_of_numbers_arrives_too(line):
    here, there = line
    dates = np.array(["2020-06-19", "2021-02-18"], "M8[D]")
    here.send(np.array([1, "a", None], object), dates, np.random.default_rng(3), np.float32(2))
    things, days, rng, number = there.receive()
    assert things.tolist() == [1, "a", None] and (days == dates).all()
    assert rng.random() == np.random.default_rng(3).random()
    assert number == 2 and type(number) is np.float32
    here.send(np.ma.masked_less([1, 2, 3], 2))  # more than its numbers
    (masked,) = there.receive()
    assert masked.tolist() == [None, 2, 3]


def test_who_waits_for_long_sleeps(line):
    """Awake for a millisecond, of the quarter of a second that it takes."""
    here, there = line
    sender = threading.Timer(0.25, here.send, ["at last"])
    sender.start()
    began = time.thread_time()
    assert there.receive() == ["at last"]
    assert time.thread_time() - began < 0.05
    sender.join()


@pytest.mark.parametrize("size", [1, 10**6])
@pytest.mark.parametrize("late", [0.0, 10 * _messages.AWAKE])
def test_it_is_awaited_awake_and_asleep(line, size, late):
    """Also what a pipe does not hold at once: who sends waits for who receives."""
    here, there = line
    array = np.random.default_rng(0).standard_normal(size)

    def send():
        time.sleep(late)
        here.send(array)

    sender = threading.Thread(target=send)
    sender.start()
    (received,) = there.receive()
    sender.join()
    np.testing.assert_array_equal(received, array)


@pytest.mark.parametrize("late", [0.0, 10 * _messages.AWAKE])
def test_a_closed_end_is_noticed(late):
    here, there = Line.ends()
    closer = threading.Timer(late, there.close)
    closer.start()
    with pytest.raises(EOFError):
        here.receive()
    closer.join()
    with pytest.raises(ConnectionError):
        here.send(1)
    here.close()
