"""What the ranks of a job know of each other before they run."""
