"""What is measured and recorded."""
