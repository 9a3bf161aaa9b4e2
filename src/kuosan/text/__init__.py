"""Text: lines, tables and poems as tokens, an n-gram model to compare with, and a judge of generated samples."""
