"""What is known of base models: their kinds, sites, identity, and how to load them."""
