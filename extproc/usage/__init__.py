"""What every request cost, on its way: from the journal on this disk into the usage store, and how it is read there."""
