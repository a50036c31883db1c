"""Text and files: from raw text to token files and batches, and a model in other tools' formats."""
