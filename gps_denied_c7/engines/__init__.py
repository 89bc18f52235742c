"""Engine files on disk: named, described, trusted, cached."""
