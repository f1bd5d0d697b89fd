"""Other people's tools: each a small file, imported only on use, through the tool's own library."""
