"""Images: pixel data with integer levels, and a judge of generated samples."""
