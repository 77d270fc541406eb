"""The data set: composed, rendered and captioned music, and free-licence recordings."""
