"""The strategies behind one Protocol."""
