"""Pitch classes by name, written out so that the tests are independent of the code under test."""

PITCH_CLASSES = {
    name: pitch_class
    for pitch_class, names in enumerate(
        ("C", "C# Db", "D", "D# Eb", "E", "F", "F# Gb", "G", "G# Ab", "A", "A# Bb", "B"),
    )
    for name in names.split()
}
