"""Text and files: from raw text to token files and batches, and reading GPT-2's weights."""
