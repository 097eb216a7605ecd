"""The command `moe-ext`: what it says of this machine, of a checkpoint, and its demonstration."""
