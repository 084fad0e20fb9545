"""Train a model on images: the Trainer, its flags, optimizers, clock, guards and checkpoints."""
