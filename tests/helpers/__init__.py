"""What tests of several folders use: the table of ops, the error rule, plain PyTorch, models."""
