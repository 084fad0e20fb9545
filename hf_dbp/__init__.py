"""Masked-autoencoder pre-training of Vision Transformers with decorrelated backpropagation (DBP)."""
