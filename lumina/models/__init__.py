"""The networks: a folder for each family, and the parts that families share."""
