"""Infrastructure for the scripts: checkpoints, logging, processes, terminal, scoring, export."""
