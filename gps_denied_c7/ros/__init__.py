"""The ROS 2 side, the only folder that imports ROS: node, parameters, messages, diagnostics, replay."""
