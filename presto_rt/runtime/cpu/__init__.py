"""C++ and oneDNN on CPUs."""
