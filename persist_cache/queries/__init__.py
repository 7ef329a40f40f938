"""What people ask of a store, as values and as JSON; the same for the commands and the admin API.

Nothing here changes a store, and no model is needed.
"""
