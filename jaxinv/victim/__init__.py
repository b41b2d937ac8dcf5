"""The network that is attacked: untrained, in training, and on disk."""
