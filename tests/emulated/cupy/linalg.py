"""``cupy.linalg``."""

import numpy as np

from cupy._array import device_function

__all__ = [name for name in np.linalg.__all__ if not name.endswith("Error")]
globals().update({name: device_function(getattr(np.linalg, name)) for name in __all__})
