"""What comes from other people and what goes to them: checked checkpoints, model cards, pushes, the Hub's errors."""
