"""One file per verb: wires rooms, computes nothing."""
