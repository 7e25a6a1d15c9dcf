"""Candidates of new patients, and how they compare with CellSearch's event gallery."""
