"""Which engine serves, and what happens when one fails."""
