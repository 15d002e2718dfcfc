"""Patterns of keys that a query sees. The name of a file is the name that option `pattern` of a core attention takes."""
