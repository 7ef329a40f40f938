"""The store: index and blobs kept consistent, within a budget, for any number of processes."""
