"""What a server's requests and its disk did lately: bounded series in memory, for the page."""
