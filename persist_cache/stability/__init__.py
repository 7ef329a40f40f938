"""What changes between the requests of one client and breaks their common prefix."""
