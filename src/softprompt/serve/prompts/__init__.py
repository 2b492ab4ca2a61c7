"""The prompts that are served, kept on disk and kept in step with a folder."""
