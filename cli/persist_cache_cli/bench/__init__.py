"""`persist-cache bench`: an agent's session, timed against servers in processes of their own."""
