"""The networks: `UNet` for images, `MLP` for points."""

from tinydiff.models.mlp import MLP
from tinydiff.models.unet import UNet

__all__ = ["MLP", "UNet"]
