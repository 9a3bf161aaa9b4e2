"""Speech: waves and mels, what makes a wave of a mel, and how good made waves are."""
