"""Make the class-balanced MNIST subset that travels with the package, from the 60,000 training digits.

Reproduces the shipped files byte for byte (with another zlib: the same content, compressed otherwise), and
prints the SHA-256 sums of their content, which `tinydiff.datasets.mnist` lists.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

from tinydiff.datasets.idx import decompress, read_idx, write_idx
from tinydiff.datasets.mnist import SUBSET_FOLDER, balanced_subset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--source", type=Path, required=True, metavar="FOLDER", help="folder with MNIST's original .gz files"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=SUBSET_FOLDER,
        metavar="FOLDER",
        help="where to write; default: the package",
    )
    parser.add_argument(
        "--per-class", type=int, default=1000, help="digits of each class; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of choice and order; default: %(default)s")
    arguments = parser.parse_args()

    images = read_idx(arguments.source / "train-images-idx3-ubyte.gz", ndim=3)
    labels = read_idx(arguments.source / "train-labels-idx1-ubyte.gz", ndim=1)
    rng = np.random.default_rng(arguments.seed)
    images, labels = balanced_subset(images, labels, arguments.per_class, rng)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, array in (("subset-images-idx3-ubyte.gz", images), ("subset-labels-idx1-ubyte.gz", labels)):
        path = arguments.out / name
        write_idx(path, array)
        content = decompress(path.read_bytes(), name)
        print(f"{path}: shape {array.shape}, SHA-256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
