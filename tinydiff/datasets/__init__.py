"""What there is to learn from: eight shapes in the plane (`toy2d`) and handwritten digits (`mnist`)."""

from tinydiff.datasets import mnist, toy2d

__all__ = ["mnist", "toy2d"]
