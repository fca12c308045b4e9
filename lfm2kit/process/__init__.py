"""This process: its signals, streams, cores and memory."""
