"""Compiled programs written to disk, to run without the model's Python code; see the README beside this file."""
