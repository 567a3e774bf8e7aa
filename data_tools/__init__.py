"""Images to tar shards, and everything that looks at shards. Never imports torch; see docs/data.md for the format."""
