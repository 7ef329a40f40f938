"""The server as a service of the user's: what the file says, and who is asked to run it."""
