"""What is done before take-off and after landing."""
