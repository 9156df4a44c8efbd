"""RED adapters as a library."""
