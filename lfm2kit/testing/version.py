"""The version of the conformance suite."""

# Raised whenever a backend may get another verdict: by a new check, or by one that has changed.
SUITE_VERSION = 1
