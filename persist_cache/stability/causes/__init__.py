"""Why two prompts part: what it is, where, what it costs, and what would mend it.

Pure, and fast enough for each request of a server: bodies in, a cause out.
"""
