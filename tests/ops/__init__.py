"""The ops and what torch does with them."""
