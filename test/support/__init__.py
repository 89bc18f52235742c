"""What the tests share: stand-ins, files and networks that they need, and ROS peers; none of it is a test."""
