"""Train the digit classifier that travels with the package, on MNIST's 60,000 training digits.

Every epoch visits each digit once, in a new order, moved by up to two pixels along rows and columns. The
weights are written after every epoch, with the accuracy on the 10,000 test digits, which decide nothing:
neither when to stop nor which epoch to keep. On one machine the same seed gives the same weights.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

import tinydiff as td
from tinydiff.checkpoint import save_arrays
from tinydiff.datasets import mnist
from tinydiff.losses import cross_entropy
from tinydiff.metrics.digits import WEIGHTS
from tinydiff.models.classifier import Classifier

SHIFT = 2  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="folder with MNIST's four original files"
    )
    parser.add_argument(
        "--out", type=Path, default=WEIGHTS, metavar="FILE", help="where to write; default: the package"
    )
    parser.add_argument("--epochs", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=3e-3, help="largest learning rate; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, shifts; default: %(default)s")
    arguments = parser.parse_args()

    os.environ["TINYDIFF_DATA"] = str(arguments.data)  # read from there, and verified
    (images, labels), (test_images, test_labels) = mnist.load("train"), mnist.load("test")
    windows = shifted(images)
    model = Classifier(rng=np.random.default_rng(arguments.seed))
    optimizer = td.Adam(model.named_parameters(), arguments.lr, weight_decay=1e-2)
    batches = len(images) // arguments.batch_size
    steps = arguments.epochs * batches
    for epoch in range(1, arguments.epochs + 1):
        began = time.perf_counter()
        rng = np.random.default_rng([arguments.seed, epoch])
        order = rng.permutation(len(images))[: batches * arguments.batch_size]
        losses = []
        for index in tqdm(np.split(order, batches), desc=f"epoch {epoch}", leave=False):
            down, right = rng.integers(2 * SHIFT + 1, size=(2, len(index)))
            optimizer.zero_grad()
            logits, backward = model(mnist.to_model_range(windows[index, down, right]))
            loss, gradient = cross_entropy(logits, labels[index])
            backward(gradient)
            optimizer.lr = arguments.lr * td.warmup_cosine(optimizer.steps, steps, warmup=min(500, steps))
            optimizer.step()
            losses.append(float(loss))
        accuracy = accuracy_of(model, test_images, test_labels)
        about = {"config": model.config, "epochs": epoch, "seed": arguments.seed, "test_accuracy": accuracy}
        save_arrays(arguments.out, model.state_dict(), about)
        print(
            f"epoch {epoch}: training loss {np.mean(losses):.4f}, test accuracy {accuracy:.2%}, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )


def shifted(images: np.ndarray) -> np.ndarray:
    """A view (N, 2 SHIFT + 1, 2 SHIFT + 1, H, W): [:, i, j] are the images moved by i - SHIFT, j - SHIFT."""
    height, width = images.shape[1:]
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
    return sliding_window_view(padded, (height, width), axis=(1, 2))[:, ::-1, ::-1]


def accuracy_of(model: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    logits = [model.predict(mnist.to_model_range(part)) for part in np.array_split(images, 20)]
    return float(np.mean(np.argmax(np.concat(logits), axis=1) == labels))


if __name__ == "__main__":
    main()
