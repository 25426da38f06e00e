"""What the networks of two families or more are made of."""
