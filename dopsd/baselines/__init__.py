"""Other methods of training, to compare with: one module each."""
