"""Zip checkpoints, as torch.save has written them since torch 1.6."""
