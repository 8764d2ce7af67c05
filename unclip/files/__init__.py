"""What lies on disk: model folders, checkpoints, tensors, and the folders of diffusers."""
