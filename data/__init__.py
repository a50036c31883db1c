"""From raw text to token files: tokenizer, conversation, tokens, text, fineweb, download."""
