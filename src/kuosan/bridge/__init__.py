"""The bridge to diffusers: what its files say, in this package's nouns."""
