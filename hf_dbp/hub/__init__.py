"""Exchange with other people: checked checkpoints, model cards, pushes, and the Hub's errors."""
