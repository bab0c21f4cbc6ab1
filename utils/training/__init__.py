"""Floor 5: settings, augmentation, hardening objectives, the training loop and checkpoints."""
