"""Makes a page of a profile: one file, readable offline, without scripts, light and dark.

Each picture is a module, which gives an SVG and the same figures as a table.
"""
