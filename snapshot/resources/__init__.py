"""One module per kind of process state, its capture and its rebuild side by side.

A capture begins in `capture.py`, the stages of a rebuild are in `stages.py`, the registries of
state that is kept by NAME in `registry.py`. Descriptors have a table of their own
(`descriptors.py`). A restore needs nothing of a capture, so nothing is imported here.
"""
