"""edgegen: compress image generators and vision backbones for edge devices, and prove it with measurements."""

__version__ = "0.1.0"
