"""One frame's way from slot to answer."""
