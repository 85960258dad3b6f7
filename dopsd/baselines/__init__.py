"""Other methods of training than d-OPSD, in the same harness."""
