"""What all GPU strategies share."""
