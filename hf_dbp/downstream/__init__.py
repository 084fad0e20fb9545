"""What is done with a pre-trained encoder: segmentation, and the kNN and linear probe."""
