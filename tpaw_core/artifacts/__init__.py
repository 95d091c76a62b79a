"""What a stage leaves behind: for each file its schema, how it is written, read back and refused when damaged.

Knows files, digests and token ids; must not know how their numbers are computed, or services.
"""
