"""Keep neural-network inference running on a drone when the GPU stack misbehaves."""

import os

__version__ = '0.1.0'

# ONNX Runtime's Linux wheels from 1.29 on report to a vendor's host and keep a database under the home directory unless
# they find this when they are imported. All that imports ONNX Runtime here imports this package first, and children
# inherit it. Not setdefault: that nothing is sent holds whatever the environment says.
os.environ['ORT_DISABLE_TELEMETRY'] = '1'
