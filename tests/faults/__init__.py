"""What becomes of a run when something goes wrong: faults made on purpose, one row of docs/reliability.md a kind."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where what tests share lies, as pytest has it
