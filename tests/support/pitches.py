"""Names of pitch classes, written out here so that the tests do not lean on the code that they test."""

# fmt: off
PITCH_CLASSES = {"C": 0, "Db": 1, "C#": 1, "D": 2, "Eb": 3, "E": 4, "F": 5, "F#": 6, "G": 7, "Ab": 8, "G#": 8, "A": 9,
                 "Bb": 10, "B": 11}
# fmt: on
