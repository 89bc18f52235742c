"""The ROS 2 side: node, parameters, messages, diagnostics, replay."""
