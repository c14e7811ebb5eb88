"""Text that the main model writes: prompts, the decoder, and the file of answers."""
