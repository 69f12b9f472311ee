"""The scores of the model: finding the layer that gives them, and capturing what it gives."""
