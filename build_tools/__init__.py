"""The build of moe_ext: what is found (toolchain), what is built (plan), how (ninja_file), and what the result must satisfy (checks)."""
