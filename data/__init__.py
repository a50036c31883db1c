"""From raw text to token files: tokenizer.py, conversation.py, tokens.py, text.py, download.py."""
