"""The PTX simulator of the tests: C++ in the folders beside this file, README.md for how it is used."""
