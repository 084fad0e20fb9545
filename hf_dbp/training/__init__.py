"""From a model and images to a trained run: the Trainer, its flags, optimizers, clock, guards and checkpoints."""
