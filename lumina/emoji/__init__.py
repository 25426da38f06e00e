"""The small model that ships with the package: its data, caption encoder and training."""
