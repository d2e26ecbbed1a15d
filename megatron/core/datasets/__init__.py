"""Token files, index building, blends and GPT samples."""
