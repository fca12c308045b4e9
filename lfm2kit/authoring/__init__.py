"""The packages with which authors of plugins begin: real files, and `package`, which writes them.

Files in `templates/` are rendered by `string.Template`, in which `$name` stands for the plugin's
name.  It only occurs where Python, TOML and YAML have a text, so that each file is valid as it is
there, too: the checks of this project lint it and look at its types.
"""
