"""What people ask of a store, as values and as JSON; reads, and changes nothing."""
