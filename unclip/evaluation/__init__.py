"""What a model's pictures are worth: measures in features of networks that had no part in it."""
