"""Writes files and folders in one step, and keeps them from replacing what is read."""
