"""One class per spec, called as the spec's docstring says; kernels lie beside their class."""
