"""Building, checking and trying out what is released; run by `scripts/release`."""
