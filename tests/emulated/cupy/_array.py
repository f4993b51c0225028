"""An array on the device: NumPy computes with it, nobody else sees its numbers without asking.

As CuPy's, it does not mix with NumPy's arrays, and does not become one by itself. What is computed lies in
C's order, where NumPy's would lie as what it is computed from; a copy in another dtype does lie so.
"""

import ctypes
import functools
import operator

import numpy as np

from cupy._memory import MemoryPointer, current_allocator
from cupy._stream import get_current_stream, is_capturing, is_put_off, not_while_capturing, run

__all__ = [
    "array",
    "asarray",
    "ascontiguousarray",
    "device_function",
    "elementwise",
    "empty",
    "empty_like",
    "ndarray",
]


class ndarray:
    """A part of the device's memory; `view` is NumPy's array of the same numbers."""

    __array_ufunc__ = None  # NumPy's arrays and numbers leave operators to this class
    __hash__ = None

    def __init__(self, shape, dtype=float, memptr=None, order="C"):
        if np.dtype(dtype).hasobject:
            raise ValueError(f"Unsupported dtype {np.dtype(dtype)}")
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if memptr is None:
            memptr = current_allocator()(size)
        self.mem = memptr.mem
        there = (ctypes.c_char * size).from_address(memptr.ptr)  # which keeps nothing alive
        self.view = np.ndarray(shape, dtype, there, order=order)

    shape = property(lambda self: self.view.shape, lambda self, shape: setattr(self.view, "shape", shape))
    dtype = property(lambda self: self.view.dtype)
    size = property(lambda self: self.view.size)
    ndim = property(lambda self: self.view.ndim)
    nbytes = property(lambda self: self.view.nbytes)
    itemsize = property(lambda self: self.view.itemsize)
    strides = property(lambda self: self.view.strides)
    flags = property(lambda self: self.view.flags)
    data = property(lambda self: MemoryPointer(self.mem, self.view.__array_interface__["data"][0]))
    T = property(lambda self: _wrapped(self.view.T, self.mem))

    @property
    def device(self):
        from cupy import cuda

        return cuda.Device(0)

    def get(self):
        not_while_capturing("copy to the host")
        get_current_stream().synchronize()
        return self.view.copy()

    def set(self, numbers):
        not_while_capturing("copy from the host")
        if not isinstance(numbers, np.ndarray):
            raise TypeError(f"Only numpy.ndarray can be set, not {type(numbers)}.")
        if numbers.dtype != self.dtype:
            raise TypeError(f"{numbers.dtype} array cannot be set to {self.dtype} array")
        if numbers.shape != self.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {numbers.shape}")
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        run(functools.partial(self.view.__setitem__, ..., numbers))  # read when it is its turn

    def item(self):
        return self.get().item()

    def tolist(self):
        return self.get().tolist()

    def fill(self, value):
        run(functools.partial(self.view.fill, _filling(value)))

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed: use `.get()`.")

    def __len__(self):
        return len(self.view)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __setitem__(self, at, value):
        _not_by_a_mask(at)
        view, at, value = self.view, _bare(at), _filling(value)
        run(functools.partial(view.__setitem__, at, value))

    def __repr__(self):
        return f"{self.get()!r} (emulated)"

    def __reduce__(self):
        return asarray, (self.get(),)

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, memo):
        return self.copy()


def _wrapped(view, mem):
    made = object.__new__(ndarray)
    made.view, made.mem = view, mem
    return made


def _bare(x):
    """The same with NumPy's views in the places of the device's arrays."""
    if isinstance(x, ndarray):
        return x.view
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}: it is on the host.")
    if type(x) in (list, tuple):
        return type(x)(map(_bare, x))
    if type(x) is slice:
        return slice(*(i.item() if isinstance(i, ndarray) else i for i in (x.start, x.stop, x.step)))
    return x


def _filling(x):
    """What is written to an array: another's numbers or, of the host, one number."""
    if isinstance(x, (np.ndarray, list, tuple)) and np.ndim(x):
        raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
    return x[()] if isinstance(x, np.ndarray) else _bare(x)


def _operand(x):
    """TypeError unless it is an array of the device, or a number."""
    if not isinstance(x, (ndarray, bool, int, float, complex, np.generic)):
        raise TypeError(f"Unsupported type {type(x)}")
    return x


def _arrays_of(x):
    if isinstance(x, ndarray):
        yield x
    elif isinstance(x, (list, tuple)):
        for each in x:
            yield from _arrays_of(each)


def device_function(function, make=None):
    """NumPy's function, for arrays of the device: what it makes is made there, what it views stays a view.

    `make` makes the room for an array: `empty_like` in the order of NumPy's, otherwise it is C's.
    """

    @functools.wraps(function, updated=())
    def call(*args, **kwargs):
        given = [*_arrays_of(args), *_arrays_of(list(kwargs.values()))]
        views = [x.view for x in given]
        args, kwargs = _bare(args), {key: _bare(value) for key, value in kwargs.items()}

        work = functools.partial(_quietly, function, *args, **kwargs)
        out = kwargs.get("out")
        if out is not None:
            run(work)
            return next(x for x in given if x.view is out)
        found = work()  # in a recording of what is there by chance, for its shape
        filled = []
        placed = _placed(found, given, filled, make or _in_order)

        def fill(found):
            for there, numbers in zip(filled, _made(found, views), strict=True):
                there[...] = numbers

        if filled and is_put_off() and (given or is_capturing()):
            run(lambda: fill(work()))  # with what is there by then
        else:
            run(lambda: fill(found))
        return placed

    return call


def elementwise(function):
    """As `device_function`, of arrays of the device and numbers only: no list, and nothing of the host."""
    on_device = device_function(function)

    @functools.wraps(function, updated=())
    def call(*args, **kwargs):
        return on_device(*map(_operand, args), **kwargs)

    return call


def _quietly(function, *args, **kwargs):
    with np.errstate(all="ignore"):  # a GPU does not warn
        return function(*args, **kwargs)


def _placed(found, given, filled, make):
    """`found` as arrays of the device; those that have to be filled are added to `filled`."""
    if isinstance(found, (tuple, list)):
        parts = [_placed(each, given, filled, make) for each in found]
        return type(found)(*parts) if hasattr(found, "_fields") else type(found)(parts)
    if not isinstance(found, (np.ndarray, np.generic)):
        return found
    for x in given:
        if _shares(found, x.view):
            return x if found is x.view else _wrapped(found, x.mem)
    made = make(found)
    filled.append(made.view)
    return made


def _made(found, views):
    """Of what a function returned, the arrays that are new."""
    if isinstance(found, (tuple, list)):
        for each in found:
            yield from _made(each, views)
    elif isinstance(found, (np.ndarray, np.generic)) and not any(_shares(found, view) for view in views):
        yield found


def _shares(found, view):
    return found is view or (isinstance(found, np.ndarray) and np.may_share_memory(found, view))


def _in_order(found):
    return empty(found.shape, found.dtype)


def _not_by_a_mask(at):
    """In a recording a mask is refused: CuPy asks the device how many it selects, also to write there."""
    for each in at if isinstance(at, tuple) else (at,):
        if isinstance(each, ndarray) and each.dtype == bool:
            not_while_capturing("count what a mask selects")


def _item(view, at):
    found = view[at]
    if isinstance(found, np.generic):  # CuPy's is a view of no dimension
        found = view[(*at, ...) if isinstance(at, tuple) else (at, ...)]
    return found


def _in_place(function):
    def call(self, other):
        run(functools.partial(_quietly, function, self.view, _bare(_operand(other))))
        return self

    return call


OPERATORS = "add sub mul truediv floordiv mod pow lshift rshift and_ or_ xor"
for name in OPERATORS.split():
    plain, bare = getattr(operator, name), name.rstrip("_")
    setattr(ndarray, f"__{bare}__", elementwise(plain))
    setattr(ndarray, f"__r{bare}__", elementwise(lambda self, other, plain=plain: plain(other, self)))
    setattr(ndarray, f"__i{bare}__", _in_place(getattr(operator, "i" + bare)))
for name in ["lt", "le", "eq", "ne", "ge", "gt", "neg", "pos", "abs", "invert"]:
    setattr(ndarray, f"__{name}__", elementwise(getattr(operator, name)))
_getitem = device_function(_item)


def _item_of(self, at):
    _not_by_a_mask(at)
    return _getitem(self, at)


ndarray.__getitem__ = _item_of
METHODS = "reshape transpose swapaxes ravel flatten squeeze repeat copy clip round"
METHODS += " sum mean max min all any prod std var argmax argmin argsort cumsum"
for name in METHODS.split():
    setattr(ndarray, name, device_function(getattr(np.ndarray, name)))
ndarray.astype = device_function(np.ndarray.astype, lambda found: empty_like(found))
for to_host in (bool, int, float, complex):  # but no index, as CuPy's
    setattr(ndarray, f"__{to_host.__name__}__", lambda self, to_host=to_host: to_host(self.get()))


def array(obj, dtype=None, copy=True, order="K", ndmin=0):
    if isinstance(obj, ndarray):
        return obj.astype(obj.dtype if dtype is None else dtype, copy=copy)
    not_while_capturing("copy from the host")
    if order == "K":
        order = "F" if isinstance(obj, np.ndarray) and obj.flags.fnc else "C"
    return device_function(lambda: np.array(obj, dtype, order=order, ndmin=ndmin), empty_like)()


def asarray(a, dtype=None, order="K"):
    return array(a, dtype, copy=False, order=order)


def ascontiguousarray(a, dtype=None):
    if not isinstance(a, ndarray):
        raise TypeError(f"Argument 'a' has incorrect type (expected ndarray, got {type(a)})")
    a = asarray(a, dtype)
    if a.flags.c_contiguous:
        return a if a.ndim else a.reshape(1)
    return device_function(np.ascontiguousarray)(a)


def empty(shape, dtype=float, order="C"):
    return ndarray(shape, dtype, order=order)


def empty_like(prototype, dtype=None):
    """In the order of the prototype in memory, as near as can be."""
    like = np.empty_like(prototype.view if isinstance(prototype, ndarray) else prototype, dtype)
    axes = sorted(range(like.ndim), key=lambda axis: -like.strides[axis])
    made = empty([like.shape[axis] for axis in axes], like.dtype)
    made.view = made.view.transpose(np.argsort(axes))
    return made
