"""Models: found, proven, enabled, given back; with PEFT, bitsandbytes, accelerate and sharding."""
