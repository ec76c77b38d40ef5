"""Stable Diffusion 1.x, 2.x and SDXL U-Nets: no chain of blocks, whole calls can be skipped."""

from accel.family import Family

FAMILY = Family(name="unet", latent="sample")
