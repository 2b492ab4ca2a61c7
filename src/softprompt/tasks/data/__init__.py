"""A task's rows: files, splits, images, tokens and batches."""
