"""The decoder, its weights and its tokenizer: a Hugging Face folder in, the same folder out."""
