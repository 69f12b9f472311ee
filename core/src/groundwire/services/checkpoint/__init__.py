"""Checkpoints: what they remember of the plugins, and how models come back from them and leave groundwire."""
