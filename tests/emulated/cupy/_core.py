"""What ``cupy._core`` says of products: whether CUPY_TF32 asks for 11 digits."""

import os


def get_compute_type(kind):
    """7 for TF32, else 0."""
    return 7 if os.environ.get("CUPY_TF32") == "1" and kind == "f" else 0
