"""Pixels in, network input out."""
