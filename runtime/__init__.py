"""Everything around the idea: checkpoints, logging, processes, terminal, scoring, export."""
