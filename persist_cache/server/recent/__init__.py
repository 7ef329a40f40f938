"""What a server remembers of its latest requests, in memory alone: why they hit or missed."""
