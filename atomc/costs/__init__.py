"""What a plan costs: bytes and FLOPs as formulas in its symbols, occupancy, predicted times. Nothing is measured."""
