"""How fast the code is beside other packages, and what it survives. Results are in README.md."""
