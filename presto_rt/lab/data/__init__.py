"""Data set of composed, rendered and captioned music, and of recordings under free licenses."""
