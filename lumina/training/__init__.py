"""Training of the networks: the loss of flow matching, and runs that lose nothing when stopped."""
