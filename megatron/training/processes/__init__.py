"""This process, its launcher, its workers and its streams. Nothing here imports torch."""
