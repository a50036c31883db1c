"""Infrastructure of the scripts: checkpoints, logging, processes, terminal, scoring, export."""
