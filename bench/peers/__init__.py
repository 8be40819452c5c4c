"""The other ways to get a copy of a process, each in its usual form."""
