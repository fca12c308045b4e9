"""The blocks: kernels below, the class that packs weights and calls them above."""
