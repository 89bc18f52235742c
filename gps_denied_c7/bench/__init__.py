"""The benchmark: this node beside the forty lines that would replace it and beside the bare engine."""
