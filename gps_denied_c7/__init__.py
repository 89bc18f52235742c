"""Keep neural-network inference running on a drone when the GPU stack misbehaves."""

__version__ = '0.1.0'
