"""To and from diffusers, without torch: U-Nets, the processes they are trained for, and files of both."""

from tinydiff.interop._files import load_diffusers, load_pipeline, save_diffusers, save_pipeline
from tinydiff.interop._process import diffusion_from_diffusers, diffusion_to_diffusers
from tinydiff.interop._unet import unet_from_diffusers, unet_to_diffusers

__all__ = [
    "diffusion_from_diffusers",
    "diffusion_to_diffusers",
    "load_diffusers",
    "load_pipeline",
    "save_diffusers",
    "save_pipeline",
    "unet_from_diffusers",
    "unet_to_diffusers",
]
